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
    """Requests sent, those that failed and were tried again included."""
    tokens: PositiveInt | None = None
    """Prompt and answer tokens, as the endpoint counts them."""
    money: PositiveFloat | None = None
    """In the currency of the prices."""
    price_per_million_prompt: Annotated[float, Field(ge=0)] = 0.0
    """Of a million prompt tokens."""
    price_per_million_answer: Annotated[float, Field(ge=0)] = 0.0
    """Of a million answer tokens."""
    when_spent: Literal["stop", "go_on"] = "stop"
    """stop: the run ends, to go on once the budget is raised; go_on: with the answers that were paid for."""

    @model_validator(mode="after")
    def _priced(self) -> "Budget":
        if self.money is not None and not (self.price_per_million_prompt or self.price_per_million_answer):
            raise ValueError("a budget in money needs price_per_million_prompt or price_per_million_answer")
        return self


class Endpoint(Section):
    """A server with OpenAI's interface."""

    url: str
    """Up to and without `/chat/completions`, such as https://api.openai.com/v1."""
    model: ServedModel
    """The name that the server knows the model by."""
    api: Literal["chat", "completions"] = "chat"
    """chat: messages; completions: a prompt's text is continued."""
    key_env: str = ""
    """The environment variable that holds the key: the service's usual one (OPENAI_API_KEY goes to openai.com alone) or
    one whose name begins with CASCADE_; this machine is sent any. The key itself is never in a recipe nor written."""
    concurrency: PositiveInt = 4
    """Requests under way at a time."""
    timeout_seconds: PositiveFloat = 120.0
    """Without an answer for so long, a request is tried again."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Of one request, after 408, 409, 429 and 5xx answers, broken connections and answers that cannot be read."""
    max_backoff_seconds: PositiveFloat = 60.0
    """Longest pause between two tries; a server's Retry-After is kept to as long as it is at most ten times that."""
    top_logprobs: Annotated[int, Field(ge=1, le=20)] | None = None
    """Ask for the log-probabilities of so many of the likeliest tokens at each place, for distill.teacher: logprobs."""
    extra_body: dict[str, object] = {}
    """Further keys of every request, such as {reasoning_effort: low}; they win over ours, and null leaves ours out:
    {max_tokens: null, max_completion_tokens: 512}."""
    allow_http: bool = False
    """Plain http to other machines than this one."""
    budget: Budget = Budget()

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
    """Which answers are kept; each that is not is counted under its reason."""

    min_words: Annotated[int, Field(ge=0)] = 1
    max_words: PositiveInt | None = None
    truncated: Literal["keep", "drop"] = "keep"
    """Answers that ended at max_new_tokens, or that their server does not say to have ended by themselves."""
    thoughts: Literal["stop", "keep", "strip", "drop"] = "stop"
    """Reasoning that an answer's text begins with (<think> ... </think>). stop: generation ends at the first, so that
    you choose; keep: it is part of the answer; strip: students learn the answer alone; drop: no such answer is kept."""
    max_repetition: Fraction = 0.5
    """Share of an answer's four-word runs that stood in it before; 1: any."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """exact: the same answer to the same prompt, but for case and white space; near: three quarters of its five-word
    runs in one answer that is kept, to whatever prompt."""
    max_perplexity: PositiveFloat | None = None
    """Of the answer after its prompt, by the parent."""


class Generate(Section):
    """Prompts, who answers them, and what is kept."""

    teacher: Literal["parent"] | ModelReference = "parent"
    """parent, or a model's reference; not used with an endpoint."""
    endpoint: Endpoint | None = None
    """Ask a server instead of a model here."""
    prompts: RecipePaths = []
    """Files of rows (JSONL, JSON, Parquet), each with a `prompt` (a text) or `messages`; folders and patterns, as
    data.train takes them."""
    templates: Names = []
    """Prompts with {names} in them, filled in with `values`, every combination once."""
    values: dict[str, list[str]] = {}
    """name -> what may stand there."""
    text: RecipePaths = []
    """Files of text (as data.train takes them); the first words of each document are a prompt."""
    text_words: PositiveInt = 16
    """Words of each document of `text`."""
    stdlib: bool = False
    """Prompts from the standard library's source: the first lines of its functions."""
    system: str = ""
    """A system message before every prompt; chat only."""
    chat: bool | None = None
    """Prompts go through the chat template. Not given: where the teacher has one, or the endpoint's api is chat."""
    num_prompts: PositiveInt | None = None
    """How many, drawn evenly from all; all where not given."""
    answers: PositiveInt = 1
    """Of each prompt."""
    max_new_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: all; a model here only."""
    batch_size: PositiveInt = 16
    """Answers written at a time by a model here."""
    filters: Filters = Filters()

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
