"""Slots: places for questions, in which suffixes are prefilled without padding and answers are decoded.

A slot whose answer has ended takes another question of the batch. No shape depends on who else is in it: in float32 on a CPU a
question's results have the same bits in any company (where the machine's matrix products have; the load's proof measures it).
A step of decoding reads nothing from the device, so that CUDA captures it in one graph.

Served so are decoders whose layers attend to text before them, all of it or a window.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.cache import Row
from workers.engine.decoding.answer_states import AnswerStates
from workers.engine.decoding.decode import Answer
from workers.engine.decoding.slot_cache import Plan, SlotCache
from workers.engine.decoding.slot_state import SlotState
from workers.engine.hooks import outputs
from workers.engine.models.base import Family
from workers.errors import in_a_line

logger = logging.getLogger(__name__)
_BLOCK = 64  # of a capacity; on the CPU attention looks at a multiple of it
_STEPS = 4  # of decoding between two looks at the device, on CUDA
# Rows of a matrix product on the CPU, for each thread: fewer than twice as many, or not a multiple of it, and its kernel is
# another one for some rows, with other last bits.
_ROWS = 4


@dataclass(slots=True)
class Prefill:
    """Suffixes in slots, to be run: ids and text positions (N,); their slots and their last tokens, (n,)."""

    plan: Plan
    ids: Tensor
    positions: Tensor
    where: Tensor
    last: Tensor


class Slots:
    """The slots of one loaded model."""

    def __init__(self, family: Family, ends: Sequence[int], axes: int | None) -> None:
        self._family, self._axes = family, axes
        self._device: torch.device = family.model.get_input_embeddings().weight.device
        self._ends = torch.tensor(list(ends), device=self._device)
        self._kv = SlotCache(family, self._device)
        self._given: SlotState | None = None
        self._graph: Any = None  # False: it cannot be captured
        self._fresh = False  # some slot has no token of its answer yet
        self._owners: list[int | None] = []
        self._kept: AnswerStates | None = None

    @property
    def _state(self) -> SlotState:
        assert self._given is not None
        return self._given

    # Memory

    def reserve(self, row: Row, number: int, tokens: int, answer: int) -> None:
        """Have at least some slots for so many tokens each, of which `answer` may be an answer; empties them."""
        capacity = -(-tokens // _BLOCK) * _BLOCK
        kv = self._kv
        fits = number <= kv.number and capacity <= kv.capacity and len(row.kv) <= kv.depth
        if self._given is None or not fits or answer > self._given.tokens.shape[1]:
            self.release()
            kv.allocate(row, number, capacity)
            self._given = SlotState.empty(self._family, self._device, number, max(1, answer))
            self._every = torch.arange(number, device=self._device)
        self._state.alive.zero_()
        self._owners = [None] * self._kv.number

    def shrink(self, number: int, answer: int) -> None:
        """Give up more slots, or longer answers, than these, where what is kept of each is large."""
        if self._given is not None and (self._kv.number > number or self._given.tokens.shape[1] > max(1, answer)):
            self.release()

    def release(self) -> None:
        """Free the memory."""
        self._given = self._graph = self._kept = None
        self._kv.release()

    # Questions in

    @property
    def free(self) -> list[int]:
        """The slots that hold no question."""
        return [slot for slot, owner in enumerate(self._owners) if owner is None]

    @property
    def busy(self) -> bool:
        """Whether some slot's answer goes on."""
        return any(owner is not None for owner in self._owners)

    def begin(self, penalty: float, kinds: Sequence[str] = (), layers: Sequence[int] = ()) -> None:
        """Set the repetition penalty, and which states of answers are kept, of which layers."""
        self._state.penalty.fill_(penalty)
        have = None if self._kept is None else (self._kept.kinds, self._kept.layers)
        if have != ((tuple(kinds), tuple(layers)) if kinds else None):
            longest, width, dtype = self._state.tokens.shape[1], self._family.text.hidden_size, self._family.model.dtype
            shape = self._kv.number, longest, width, dtype
            self._kept = AnswerStates(kinds, layers, *shape, self._device) if kinds else None
            self._graph = self._graph if self._graph is False else None  # of a step that kept others

    def take(
        self, owners: Sequence[int], rows: Sequence[Row], of: Sequence[int], prompts: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]], limits: Sequence[int],
    ) -> Prefill:  # fmt: skip
        """Put questions into free slots: the i-th goes on from a copy of rows[of[i]].

        Its answer has limits[i] tokens at most. `run` is to follow.
        """
        chosen = self.free[: len(owners)]
        for slot, owner in zip(chosen, owners, strict=True):
            self._owners[slot] = owner
        lengths = [rows[i].length for i in of]
        self._kv.copy(rows, of, chosen)
        sizes = [len(ids) for ids in suffixes]
        begins = [0, *itertools.accumulate(sizes)]
        used = [length + size for length, size in zip(lengths, sizes)]
        spans = [(slot, begins[i], begins[i + 1], used[i]) for i, slot in enumerate(chosen)]
        next_positions = [rows[i].next_position for i in of]
        tokens = np.array(
            [
                (token, slot, length + j, position + j)
                for slot, length, position, ids in zip(chosen, lengths, next_positions, suffixes)
                for j, token in enumerate(ids)
            ]
        )
        if short := self._short(len(tokens)):
            tokens = np.concatenate([tokens, tokens[-1:].repeat(short, axis=0)])
        ids, slot, place, positions = self._on_device(tokens.T)
        state = self._state
        facts = np.array([chosen, used, [p + n for p, n in zip(next_positions, sizes)], [e - 1 for e in begins[1:]], limits])
        where, counts, following, last, limit = self._on_device(facts)
        state.used[where] = counts.int()
        state.position[where] = following
        state.seen[where] = False
        known = [(slot, token) for slot, prompt in zip(chosen, prompts) for token in set(prompt) if token < state.seen.shape[1]]
        state.seen[tuple(self._on_device(np.array(known).T))] = True
        state.count[where] = 0
        state.ended[where] = False
        state.limit[where] = limit
        state.alive[where] = limit > 0
        if self._kept is not None:
            self._kept.clear(where)
        self._fresh = True
        plan = Plan(slot, place, state.used, spans)
        if self._kv.flash:
            plan.begins, plan.longest = self._kv.begins(spans), max(sizes)
        return Prefill(plan, ids, positions, where, last)

    def run(self, prefill: Prefill) -> None:
        """Run the suffixes that were put in. Something else may end the forward, where no answers are wanted."""
        states = self._forward(prefill.plan, prefill.ids, prefill.positions)
        self._state.last[prefill.where] = states[prefill.last]

    def _on_device(self, values: Any) -> Any:
        """Copy a stack of integers (k, n) to the device at once; return its rows."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device).unbind(0)

    # Answers out

    def decode(self) -> dict[int, Answer]:
        """Run some steps. Return the answers that ended, by owner; their slots are free."""
        if self._device.type == "cuda":
            self._steps()
            alive = self._state.alive.tolist()
        else:
            alive = self._step_of_the_living()
        ended = [slot for slot, owner in enumerate(self._owners) if owner is not None and not alive[slot]]
        return self._answers(ended) if ended else {}

    def _step_of_the_living(self) -> list[bool]:
        """Choose a token for each answer that goes on; run those that go on still."""
        running = [slot for slot, owner in enumerate(self._owners) if owner is not None]
        self._choose(self._rows(running))
        alive: list[bool] = self._state.alive.tolist()
        wanted = self._state.alive
        if self._kept is not None:
            wanted = self._state.fed if self._kept.every else self._state.own
        run: list[bool] = wanted.tolist()
        if running := [slot for slot in running if run[slot]]:
            rows = self._rows(running)
            whole = running == list(range(len(rows)))
            reach = int(self._state.used[rows].max()) + 1
            self._advance(rows, running[-1] + 1, min(self._kv.capacity, -(-reach // _BLOCK) * _BLOCK), whole=whole)
        return alive

    def _rows(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor([*slots, *[slots[-1]] * self._short(len(slots))], device=self._device)

    def _short(self, rows: int) -> int:
        """Return how many rows a matrix product lacks, which the last one's copies fill up."""
        if self._device.type == "cuda":
            return 0  # decoding has a row for each slot
        unit = _ROWS * torch.get_num_threads()
        return -rows % unit if rows < 2 * unit else 0

    def _steps(self) -> None:
        """Run steps for all slots: those with first tokens as they are, others by one captured graph."""
        for _ in range(_STEPS):
            if self._fresh or self._graph is False:
                self._step_of_all()
            else:
                self._graph = self._graph or self._captured()
                if self._graph:
                    self._graph.replay()

    def _step_of_all(self) -> None:
        self._choose(self._every)
        self._advance(self._every, self._kv.number, self._kv.capacity, whole=True)

    def _captured(self) -> Any:
        """Return a graph of one step; False where it cannot be captured, as of a model on several GPUs."""
        if len({parameter.device for parameter in self._family.model.parameters()}) > 1:
            return False
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step_of_all()
        except RuntimeError as error:
            logger.warning("steps of decoding are not captured, which is slower: %s", in_a_line(error))
            return False
        return graph

    def _choose(self, rows: Tensor) -> None:
        """Choose the next token of some slots (n,), by the last one's state. Reads nothing from the device."""
        state = self._state
        logits = self._family.scores(state.last[rows]).to(self._device).float()  # (n, V)
        distribution = logits.log_softmax(-1)
        lowered = torch.where(logits < 0, logits * state.penalty, logits / state.penalty)
        chosen = torch.where(state.seen[rows], lowered, logits).argmax(-1)
        taken = distribution.gather(1, chosen[:, None])[:, 0]
        alive, count = state.alive[rows], state.count[rows]
        if self._fresh:
            entropy = torch.special.entr(distribution.exp()).sum(-1)
            state.entropy[rows] = torch.where(alive & (count == 0), entropy, state.entropy[rows])
        place = count.clamp(max=state.tokens.shape[1] - 1)
        state.tokens[rows, place] = torch.where(alive, chosen, state.tokens[rows, place])
        state.log_probabilities[rows, place] = torch.where(alive, taken, state.log_probabilities[rows, place])
        ends = torch.isin(chosen, self._ends)
        state.ended[rows] = torch.where(alive, ends, state.ended[rows])
        count = count + alive
        state.count[rows] = count
        state.alive[rows] = alive & ~ends & (count < state.limit[rows])
        state.own[rows] = alive & (~ends | (count == 1))
        state.fed[rows] = alive
        state.seen[rows, chosen] = True
        state.chosen[rows] = chosen
        self._fresh = False

    def _advance(self, rows: Tensor, slots: int, reach: int, *, whole: bool) -> None:
        """Run the tokens that were chosen for some slots, all of which are among the first `slots`. Reads nothing."""
        state = self._state
        place = state.used[rows].clamp(max=self._kv.capacity - 1)
        state.used[rows] = (state.used[rows] + 1).clamp(max=self._kv.capacity)
        positions = state.position[rows]
        state.position[rows] = positions + 1
        plan = Plan(rows, place.long(), state.used, slots=slots, whole=whole, reach=reach)
        if self._kv.flash:
            plan.begins = self._kv.one_each
        if (kept := self._kept) is None:
            state.last[rows] = self._forward(plan, state.chosen[rows], positions)
            return
        modules = {layer: self._family.layers[layer] for layer in kept.layers}
        with outputs(modules, lambda out: out[0]) as states:  # (1, n, D) to (n, D)
            state.last[rows] = self._forward(plan, state.chosen[rows], positions)
        kept.add(rows, [states[layer] for layer in kept.layers], state.own[rows], state.fed[rows])

    def _answers(self, ended: Sequence[int]) -> dict[int, Answer]:
        """Read answers, all in one copy, and free their slots."""
        state, where = self._state, torch.tensor(ended, device=self._device)
        parts = (state.count, state.ended, state.entropy, state.tokens, state.log_probabilities)
        read = torch.cat([part[where].double().view(len(ended), -1) for part in parts], dim=1).tolist()
        found, longest = {}, state.tokens.shape[1]
        kept = self._kept.vectors(where) if self._kept is not None else [{} for _ in ended]
        for slot, (count, by_token, entropy, *rest), vectors in zip(ended, read, kept, strict=True):
            owner, self._owners[slot] = self._owners[slot], None
            assert owner is not None
            number = int(count)
            ids = [int(token) for token in rest[:number]]
            reason = "eos" if by_token else "length"
            found[owner] = Answer(ids, rest[longest : longest + number], entropy, reason, vectors)
        return found

    def leave(self) -> list[int]:
        """Free all slots, where no answers are wanted. Return who held them."""
        held = [owner for owner in self._owners if owner is not None]
        self._owners = [None] * self._kv.number
        return held

    # The forward

    def _forward(self, plan: Plan, ids: Tensor, positions: Tensor) -> Tensor:
        """Run tokens (N,) at text positions (N,) through the decoder. Return their final states, (N, D)."""
        kinds = set(self._family.kinds)
        with self._kv.serve(plan) as cache:
            out = self._family.decoder(
                input_ids=ids[None],
                position_ids=positions[None] if self._axes is None else positions.expand(self._axes, 1, -1),
                attention_mask=dict.fromkeys(kinds) if len(kinds) > 1 else None,
                past_key_values=cache,
                use_cache=True,
            )
        states: Tensor = out.last_hidden_state[0].to(self._device)
        return states
