"""What an endpoint has cost so far, and what it may still cost."""

import json
import threading
from pathlib import Path

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.files import read_json, write_atomically


class BudgetSpent(RunError):
    """The budget allows no further request; the answers that came are kept."""


class Spending:
    """Requests and tokens over all starts, written to a file before a request is sent."""

    def __init__(self, path: Path, endpoint: Endpoint) -> None:
        self.path, self.budget = path, endpoint.budget
        self.spent = {"requests": 0, "prompt_tokens": 0, "answer_tokens": 0}
        if path.exists():
            try:
                self.spent |= read_json(path)
            except ValueError as error:
                raise UserError(f"{path}: damaged ({error}); write there what was spent, or remove it") from error
        self._lock = threading.Lock()

    @property
    def money(self) -> float:
        """The cost of all tokens, in the currency of the prices."""
        prices = self.budget.price_per_million_prompt, self.budget.price_per_million_answer
        return (self.spent["prompt_tokens"] * prices[0] + self.spent["answer_tokens"] * prices[1]) / 1e6

    def send(self) -> None:
        """Count a request that is about to be sent.

        Raises:
            BudgetSpent: the budget allows no further request.
        """
        with self._lock:
            tokens = self.spent["prompt_tokens"] + self.spent["answer_tokens"]
            amounts = {"requests": self.spent["requests"], "tokens": tokens, "money": self.money}
            for name, amount in amounts.items():
                limit = getattr(self.budget, name)
                if limit is not None and amount >= limit:
                    raise BudgetSpent(f"generate.endpoint.budget.{name}: {limit:g} is spent; raise it to go on")
            self._add({"requests": 1})

    def receive(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            self._add({"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens})

    def _add(self, more: dict[str, int]) -> None:
        self.spent = {name: count + more.get(name, 0) for name, count in self.spent.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.spent) + "\n")
