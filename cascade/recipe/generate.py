"""The `generate` section: text that a teacher writes, to train on."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cascade.recipe.places import ModelReference, RecipePaths, ServedModel
from cascade.recipe.section import Fraction, Names, PositiveFloat, PositiveInt, Section

HOW_ASKED = (
    "concurrency", "timeout_seconds", "max_retries", "max_backoff_seconds", "allow_http", "key_env", "budget"
)  # fmt: skip
"""Keys of an endpoint that change no answer."""


class Budget(Section):
    """What may be spent on an endpoint, over all starts of the run together.

    Looked at before a request is sent: those under way, `concurrency` at most, are still answered.
    """

    requests: PositiveInt | None = None
    """Requests sent, including those that failed and were tried again; no limit where not given."""
    tokens: PositiveInt | None = None
    """Prompt and answer tokens, as the endpoint counts them; no limit where not given."""
    money: PositiveFloat | None = None
    """Money, in the currency of the prices; no limit where not given."""
    price_per_million_prompt: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million prompt tokens."""
    price_per_million_answer: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million answer tokens."""
    when_spent: Literal["stop", "go_on"] = "stop"
    """`stop`: the run ends, and goes on once the budget is raised; `go_on`: the run goes on with the answers that it
    has."""

    @model_validator(mode="after")
    def _priced(self) -> "Budget":
        if self.money is not None and not (self.price_per_million_prompt or self.price_per_million_answer):
            raise ValueError("a budget in money needs price_per_million_prompt or price_per_million_answer")
        return self


class Endpoint(Section):
    """A server with OpenAI's interface (chat completions or completions)."""

    url: str
    """Address without `/chat/completions`, such as https://api.openai.com/v1."""
    model: ServedModel
    """The name by which the server knows the model."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: send messages; `completions`: send a text that is continued."""
    key_env: str = ""
    """Name of the environment variable with the key: the service's usual one (`OPENAI_API_KEY` goes to openai.com
    alone) or one that begins with `CASCADE_`; a server on this machine may be sent any. The key itself is never in a
    recipe and never written."""
    concurrency: PositiveInt = 4
    """Requests under way at a time."""
    timeout_seconds: PositiveFloat = 120.0
    """Seconds until a request without a whole answer is tried again."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Retries per request, after answers 408, 409, 429 and 5xx, broken connections and answers that cannot be read."""
    max_backoff_seconds: PositiveFloat = 60.0
    """Longest pause between two tries, in seconds; a server's Retry-After is respected up to ten times that."""
    top_logprobs: Annotated[int, Field(ge=1, le=20)] | None = None
    """Ask for the log-probabilities of this many of the likeliest tokens at each place, for
    `distill.teacher: logprobs`."""
    extra_body: dict[str, object] = {}
    """Further keys of every request, such as `{reasoning_effort: low}`. They replace keys of the same name, and null
    removes a key: `{max_tokens: null, max_completion_tokens: 512}`."""
    allow_http: bool = False
    """Allow plain http to machines other than this one."""
    budget: Budget = Budget()
    """What may be spent."""

    @field_validator("extra_body")
    @classmethod
    def _require_free_keys(cls, body: dict[str, object]) -> dict[str, object]:
        taken = sorted(body.keys() & {"model", "messages", "prompt", "n", "stream"})
        if taken:
            raise ValueError(f"`{taken[0]}` cannot be set here; one answer a request, and the model by `model`")
        return body

    @field_validator("key_env")
    @classmethod
    def _require_name(cls, name: str) -> str:
        if name and not name.replace("_", "a").isalnum():
            raise ValueError("the NAME of an environment variable, not a key")
        return name


class Filters(Section):
    """Which answers are kept; dropped answers are counted by reason."""

    min_words: Annotated[int, Field(ge=0)] = 1
    """Words per answer, at least."""
    max_words: PositiveInt | None = None
    """Words per answer, at most; no limit where not given."""
    truncated: Literal["keep", "drop"] = "keep"
    """What happens to answers that ended at `max_new_tokens`, or that the server does not report as ended by the
    model."""
    thoughts: Literal["stop", "keep", "strip", "drop"] = "stop"
    """What happens to reasoning at the start of an answer's text (`<think> ... </think>`). `stop`: generation ends at
    the first such answer, so that you choose; `keep`: it is part of the answer; `strip`: students learn the answer
    without it; `drop`: the whole answer is dropped."""
    max_repetition: Fraction = 0.5
    """Largest share of an answer's four-word runs that occurred in it before; 1: no limit."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Which repeated answers are dropped. `keep`: none; `exact`: the same answer to the same prompt, regardless of case
    and white space; `near`: answers to any prompt that share three quarters of their five-word runs with one kept
    answer."""
    max_perplexity: PositiveFloat | None = None
    """Largest perplexity of the answer after its prompt, by the parent; no limit where not given."""


class Generate(Section):
    """Text that a teacher writes: the prompts, the teacher, and the filters for its answers."""

    teacher: Literal["parent"] | ModelReference = "parent"
    """The model that writes: `parent`, or a model as in `parent.model`; not used with an endpoint."""
    endpoint: Endpoint | None = None
    """Ask a server instead of a model on this machine."""
    prompts: RecipePaths = []
    """Files of rows (JSON lines, JSON, Parquet), each with a `prompt` (a text) or `messages`; folders and patterns as
    in `data.train`."""
    templates: Names = []
    """Prompts with `{names}` in them, filled in from `values`; every combination once."""
    values: dict[str, list[str]] = {}
    """Texts to fill in for each name of `templates`."""
    text: RecipePaths = []
    """Files of text, as in `data.train`; the first words of each document are a prompt."""
    text_words: PositiveInt = 16
    """Words per prompt that is taken from `text`."""
    stdlib: bool = False
    """Prompts from the Python standard library's source: the first lines of its functions."""
    system: str = ""
    """System message before every prompt; needs chat."""
    chat: bool | None = None
    """Whether prompts go through the chat template. Not given: true where the teacher has a template, or the endpoint's
    `api` is `chat`."""
    num_prompts: PositiveInt | None = None
    """Number of prompts, drawn evenly from all; all where not given."""
    answers: PositiveInt = 1
    """Answers per prompt."""
    max_new_tokens: PositiveInt = 256
    """Tokens per answer, at most."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this share of the probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many likeliest tokens; 0: from all. Only for a model on this machine."""
    batch_size: PositiveInt = 16
    """Answers that a model on this machine writes at a time."""
    filters: Filters = Filters()
    """Which answers are kept."""

    @model_validator(mode="after")
    def _consistent(self) -> "Generate":
        if not (self.prompts or self.templates or self.text or self.stdlib):
            raise ValueError("no prompts: give `prompts`, `templates`, `text` or `stdlib`")
        if self.endpoint is not None and self.teacher != "parent":
            raise ValueError("give either a `teacher` or an `endpoint`")
        if self.endpoint is not None and self.top_k:
            raise ValueError("`top_k` is not in OpenAI's interface; where the server takes it, use endpoint.extra_body")
        if self.filters.thoughts == "strip" and self.endpoint is not None and self.endpoint.top_logprobs:
            raise ValueError("`filters.thoughts: strip` leaves log-probabilities without their text; give keep or drop")
        if self.system and self.chat is False:
            raise ValueError("a `system` message needs chat")
        if self.answers > 1 and self.temperature == 0:
            raise ValueError("several `answers` at temperature 0 would be the same; give a temperature")
        return self
