"""From example inputs to proven patterns: probe, infer, prove."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.learn import (
    Call,
    CallSite,
    LayerPattern,
    Learner,
    Proof,
    Sandbox,
    by_name,
    describe,
    layer_in,
    likeness,
    narrowed,
    observe,
    observe_values,
    shapes,
    stream,
    structure,
)
from ltd_fx.prove.proof import FEWEST, nobody_attends, prove, prove_alone, shows_nothing
from ltd_fx.prove.rehearse import rehearse
from ltd_fx.prove.verdict import Verdict
from ltd_fx.runtime import Site

# Enough to tell any two ways of routing apart.
_TOKENS, _SEQUENCES = 12, 2
# Enough for most windows to show, and no more than a test of all attention scores can hold.
_MANY_TOKENS = 512


class Examination:
    """A model seen through its example inputs.

    Shapes are learnt under fake tensors, where the model runs on them; values (masks, rotary tables) come from a
    forward on a few tokens of a few sequences, where the inputs can be narrowed to them. Both are of eval mode, where
    nothing is left out by chance, unless training calls the layers in another way (with fewer patches, say).

    Args:
        model: left as it was.
        layers: what is known of them.
        slots: the layers by name, none of them routed.
        inputs: (args, kwargs) of one forward.
        learn: whether another pattern may take the place of one that is built in.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[CallSite],
        slots: Mapping[str, nn.Module],
        inputs: Any,
        *,
        learn: bool = True,
    ) -> None:
        self._model, self._slots, self._inputs, self._learn = model, slots, inputs, learn
        self._sandbox = Sandbox(model)
        self._kinds = {layer.name: (layer.pattern, likeness(slots[layer.name])) for layer in layers}
        self._fake, self.training = True, False
        try:
            self.calls = self._observe(describe(*inputs))
        except LTDError:
            self._fake = False
            self.calls = self._observe(inputs)
        self._see_training()
        self.first_calls = by_name(self.calls)
        self._samples = self._pick(layers)
        learner = partial(Learner, model, slots, inputs, self.first_calls, sandbox=self._sandbox, kinds=self._kinds)
        self._learner = learner(training=self.training, fake=self._fake)
        self._values: dict[tuple[int, int | None], Mapping[str, Call]] = {}

    def divide(self, layers: Sequence[CallSite], protected: int) -> tuple[list[CallSite], list[CallSite]]:
        """Of ``layers`` those that are called on tokens enough to be examined, and those called on fewer."""
        shown, too_short = list[CallSite](), list[CallSite]()
        for layer in layers:
            if layer.name in self.first_calls:
                hidden = stream(self.first_calls[layer.name])
                seq_len = 0 if hidden is None else hidden.shape[int(layer.known_pattern.batch_first)]
                (shown if hidden is None or seq_len >= max(FEWEST, protected + 2) else too_short).append(layer)
        return shown, too_short

    def _observe(self, inputs: Any) -> list[Call]:
        return observe(
            self._model,
            self._slots,
            inputs,
            sandbox=self._sandbox,
            training=self.training,
            fake=self._fake,
            kinds=self._kinds,
        )

    def _see_training(self) -> None:
        """Look at the calls of training mode from here on, where they are others than those of eval mode."""
        self.training = True
        try:
            calls = self._observe(describe(*self._inputs) if self._fake else self._inputs)
        except LTDError:  # The model wants targets, or depends on random numbers.
            calls = self.calls
        before, now = by_name(self.calls), by_name(calls)
        other = [name for name in before.keys() & now if structure(before[name]) != structure(now[name])]
        skipped = before.keys() - now
        if other and skipped:
            raise LTDError(
                f"ltd_fx: in training {min(other)} is called with other arguments than in eval mode, and "
                f"{min(skipped)} may be skipped, so neither mode shows how all layers are called; leave them out with "
                "transform(..., layers=...)"
            )
        self.training = bool(other) or (now.keys() > before.keys())
        if self.training:
            self.calls = calls

    def rehearse(self, sites: list[Site]) -> None:
        """See that the model runs with its layers routed.

        Raises:
            LTDError: it does not, but does with them dense.
        """
        rehearse(self._model, sites, self._inputs, sandbox=self._sandbox, fake=self._fake)

    def _pick(self, layers: Sequence[CallSite]) -> dict[str, str]:
        """For each called layer the one whose proof is its own: of layers alike and called alike, the first two."""
        picked: dict[Any, list[str]] = {}
        samples = {}
        for layer in layers:
            if layer.name in self.first_calls:
                call = self.first_calls[layer.name]
                same = picked.setdefault((self._kinds[layer.name], shapes(call.args, call.kwargs)), [])
                if len(same) < 2:
                    same.append(layer.name)
                samples[layer.name] = same[-1]
        return samples

    def _has_table(self, layer: CallSite, seq_dim: int) -> bool:
        """Whether the layer has a buffer that could be sliced to its length."""
        hidden = stream(self.first_calls[layer.name])
        assert hidden is not None
        return any(hidden.shape[seq_dim] <= max(b.shape, default=0) for b in self._slots[layer.name].buffers())

    def _call(self, layer: CallSite, seq_dim: int, tokens: int | None) -> Call:
        """How the layer is called, in values: on so many tokens, or on as many as there are."""
        key = seq_dim, tokens
        if key not in self._values:
            self._values[key] = self._observe_values(*key)
        return self._values[key][layer.name]

    def _observe_values(self, seq_dim: int, tokens: int | None) -> Mapping[str, Call]:
        small = narrowed(self._inputs, *self._learner.probes(seq_dim), tokens, _SEQUENCES)
        slots = {name: self._slots[name] for name in self._samples.values()}
        run = partial(observe_values, self._model, slots, sandbox=self._sandbox, training=self.training)
        try:
            return run(small)
        except LTDError:
            return run(self._inputs)

    def examine(self, layer: CallSite, *, shared: bool, protected: int) -> tuple[LayerPattern, Proof]:
        """The layer's pattern, inferred where none is known, and its proof.

        Raises:
            LTDError: the layer was not called, or nothing about it can be inferred.
        """
        if layer.name not in self.first_calls:
            raise LTDError(f"ltd_fx: {layer.name} is not called; give example_inputs that call it, or leave it out")
        best: tuple[LayerPattern, Proof] | None = None
        failure = ""
        for pattern, learnt in self._hypotheses(layer):
            seq_dim = int(pattern.batch_first)
            how = partial(prove, layer.name, self._slots[layer.name], pattern)
            how = partial(how, sandbox=self._sandbox, shared=shared, protected=protected)
            try:
                proof = replace(self._try(layer, seq_dim, how), learnt=learnt)
            except LTDError as error:
                failure = failure or str(error)
                continue
            if proof.status == "tested":
                return pattern, proof
            # One of our own messages, of several failures, tells the remedy.
            if best is None or ("protect=" in proof.reason and "protect=" not in best[1].reason):
                best = pattern, proof
        if best is None:
            raise LTDError(failure)
        return best

    def _try(self, layer: CallSite, seq_dim: int, how: Callable[[Call], Proof]) -> Proof:
        """The layer's proof ``how`` it is called with a few tokens, and with more where these may not show it."""
        hidden, tokens = stream(self.first_calls[layer.name]), _TOKENS
        proof = how(self._call(layer, seq_dim, tokens))
        while shows_nothing(proof) and hidden is not None and tokens < min(hidden.shape[seq_dim], _MANY_TOKENS):
            tokens *= 4  # The first ones may all be padding, or documents of one token.
            proof = how(self._call(layer, seq_dim, tokens))
        if proof.status == "tested" and (proof.counts or self._has_table(layer, seq_dim)):
            return how(self._call(layer, seq_dim, None))  # A window or a table may only show at full length.
        return proof

    def accept_all(self, layers: Sequence[CallSite], *, shared: bool, protected: int) -> list[CallSite]:
        """As :meth:`accept`; layers that are alike and called alike are proven by two, if they go by no number."""
        accepted: dict[str, CallSite] = {}
        for layer in layers:
            sample = self._samples.get(layer.name, layer.name)
            if sample != layer.name and self._sandbox.goes_by_number(self._slots[layer.name]):
                self._samples[layer.name] = sample = layer.name
                self._values.clear()
            if sample == layer.name:
                accepted[layer.name] = self.accept(layer, shared=shared, protected=protected)
            else:
                like = accepted[sample]
                proof = like.proof and replace(like.proof, name=layer.name)
                accepted[layer.name] = replace(layer, pattern=like.pattern, proof=proof)
        return list(accepted.values())

    def accept(self, layer: CallSite, *, shared: bool, protected: int) -> CallSite:
        """The layer with what :meth:`examine` found, if it found anything; one that may not be routed is refused.

        Raises:
            LTDError: the proof fails; or it cannot be made, and nobody vouches for the pattern.
        """
        pattern, proof, verdict = self._shown(layer, shared, protected)
        what = f"ltd_fx: {layer.name} ({proof.layer_class}) cannot be routed"
        if verdict.mixes and proof.status != "wrong":
            raise LTDError(f"{what}: {verdict.mixes}; leave it out with transform(..., layers=...)")
        if shows_nothing(proof) and not self._learn and not layer.vouched:
            return layer
        if proof.status == "wrong" or (proof.status == "not verifiable" and not layer.vouched):
            if not shared and self._shown(layer, True, protected)[1].right:
                raise LTDError(
                    f"{what} where each sequence keeps tokens of its own: it shares a table among all sequences; pass "
                    "sampling='shared'"
                )
            size = "" if proof.error is None else f" (relative error {proof.error:.1e})"
            size += verdict.mixes and f": {verdict.mixes}"
            known = layer.vouched or not self._learn
            whose = f" by its {'registered' if layer.vouched else 'built-in'} pattern" if known else ""
            another = "pass example_inputs, for another to be learnt, " if known and not layer.vouched else ""
            raise LTDError(
                f"{what}{whose}, {proof.status}: {proof.reason}{size}; {another}leave it out with "
                "transform(..., layers=...), or register a LayerPattern for its class"
            )
        return replace(layer, pattern=pattern, proof=proof)

    def _shown(self, layer: CallSite, shared: bool, protected: int) -> tuple[LayerPattern, Proof, Verdict]:
        """What the test and token flow say together."""
        pattern, proof = self.examine(layer, shared=shared, protected=protected)
        verdict = self._judge(layer, pattern, shared, protected)
        if pattern == layer.pattern and not layer.vouched and nobody_attends(proof) and verdict == Verdict():
            return pattern, replace(proof, status="proven", reason=""), verdict
        if proof.status == "tested" and verdict.unknown:  # The test alone decides, so it is made with more tokens.
            how = partial(prove_alone, layer.name, self._slots[layer.name], pattern, sandbox=self._sandbox)
            many = self._call(layer, int(pattern.batch_first), _MANY_TOKENS)
            proof = replace(how(many, shared=shared, protected=protected), learnt=proof.learnt)
        if proof.status == "tested":  # That sequences do not see each other, the test alone has shown.
            proof = replace(proof, status="tested" if verdict.unknown else "proven", reason=verdict.unknown)
        return pattern, proof, verdict

    def explain(self, layer: CallSite, *, shared: bool, protected: int) -> str:
        """What the test says of the layer, and token flow, value by value, by the likeliest pattern.

        Raises:
            LTDError: nothing about it can be inferred.
        """
        from ltd_fx.prove.explain import explain
        from ltd_fx.prove.token_flow import analyse

        pattern, proof, _ = self._shown(layer, shared, protected)
        slot, call = layer_in(self._slots[layer.name]), self.first_calls[layer.name]
        error = "" if proof.error is None else f" (relative error {proof.error:.1e})"
        said = f"by the numerical test {'right' if proof.right else f'{proof.status}: {proof.reason}'}{error}"
        return f"{said}\n{explain(*analyse(slot, pattern, call, self._sandbox, shared=shared, protected=protected))}"

    def _judge(self, layer: CallSite, pattern: LayerPattern, shared: bool, protected: int) -> Verdict:
        """What token flow says of the layer as it is called at full length."""
        from ltd_fx.prove.token_flow import judge  # sympy takes longer to import than all of ltd_fx

        how = partial(judge, layer_in(self._slots[layer.name]), pattern, self.first_calls[layer.name], self._sandbox)
        return how(shared=shared, protected=protected)

    def _hypotheses(self, layer: CallSite) -> Iterator[tuple[LayerPattern, str]]:
        """The known pattern; then, where another may be learnt, those that could be, the likeliest first.

        Each with what it was learnt from.
        """
        module = layer_in(self._slots[layer.name])
        if layer.pattern is not None:
            yield layer.pattern, "a known pattern"
            if layer.vouched or not self._learn:
                return
        try:
            for hypothesis, learnt in self._learner.hypotheses(layer.name, type(module)):
                if hypothesis != layer.pattern:
                    yield hypothesis, learnt
        except LTDError:
            if layer.pattern is None:  # Else the user is told what is wrong with the one that is known.
                raise
