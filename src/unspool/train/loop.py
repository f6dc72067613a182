"""The training loop: batches, losses, backward, guard, clip, optimizers, averages, log, checkpoints, callbacks.

Step k is a pure function of the weights before it, the seed and k: stopping at any step and continuing gives the same
bits as never stopping (on the same machine, threads and number of processes).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unspool.config import to_dict, to_yaml
from unspool.data.batch import Batch
from unspool.train.checkpoint import Saved, find, save
from unspool.train.export import CODEC, export_weights, read_weights
from unspool.train.feed import Feed, to_device
from unspool.train.optim import lr_factor
from unspool.train.parallel import (
    World,
    gather_after,
    global_norm,
    local,
    one_at_a_time,
    start_world,
    sync_gradients,
    whole,
)
from unspool.train.progress import Display, Sink, Window
from unspool.train.recipe import Recipe
from unspool.train.rng import seed_step, step_rng
from unspool.train.state import TrainState, require_same
from unspool.train.stop import Stop


class Diverged(ValueError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a leg ended: `step` steps are done, of all or because of `reason`; `checkpoint` is the last one."""

    step: int
    is_done: bool
    reason: str
    checkpoint: Path


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The precision in which a method's step runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


class Trainer:
    """One leg of a training, from the newest checkpoint of `out` or from the beginning.

    Args: `recipe`; `out` the run's folder; `name` of the recipe, for people and checkpoints; `resume` "auto" continues
    what is in `out`, "never" wants an empty one, a path continues that checkpoint or run; `init_from` weights of role
    "student" to begin with (a file, or a run: its average); `show` progress.

    Callbacks use: `recipe`, `out`, `method`, `state`, `world`, `device`, `step`, `write`, `evaluating`, `autocast`.
    Raises ValueError or OSError before the first step for a recipe, a folder or a checkpoint that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | os.PathLike[str],
        *,
        name: str = "recipe",
        resume: str | os.PathLike[str] = "auto",
        init_from: str | os.PathLike[str] | None = None,
        show: bool = True,
        world: World | None = None,
    ) -> None:
        self.out, self.name = Path(out), name
        saved = find_start(self.out, resume)
        to_dict(recipe)  # refuses now what the first checkpoint could not hold
        with one_at_a_time(self.out):
            self.recipe = recipe = recipe.prepare(self.out)
        self._train = recipe.train
        self.stop = Stop(self._train.max_minutes)
        self.world = world or start_world(self._train.device, shard=self._train.shard)
        self.device = self.world.device
        self._train.check_batch(self.world.size)
        if saved is not None:
            if saved.state.get("class") != type(recipe).__qualname__:
                raise ValueError(f"{saved.path} is of a recipe {saved.state.get('class')}, "
                                 f"expected {type(recipe).__qualname__}; begin another run with --out")  # fmt: skip
            require_same(recipe, saved)
        seed_step(self._train.seed, 0, "build", 0, self.device)
        self.method = recipe.build_method(self.device)
        self.state = TrainState(self.method, self._train, self.world)
        if saved is not None:
            self.state.load(saved, self.world)
        elif init_from is not None:
            self.state.init_weights("student", read_weights(init_from))
        self._source = recipe.build_source()
        self._callbacks = tuple(recipe.callbacks())
        self._before_s = float(saved.state.get("seconds", 0.0)) if saved is not None else 0.0
        self._began: float | None = None
        self._saved_step = saved.step if saved is not None and saved.path.parent.parent == self.out else -1
        self._show = show and self.world.is_main

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def seconds(self) -> float:
        """Time trained up to here, over all legs; of an earlier leg up to the checkpoint that was continued."""
        return self._before_s + (0.0 if self._began is None else time.monotonic() - self._began)

    def autocast(self) -> torch.autocast:
        """The precision in which the method's step runs."""
        return autocast(self.device, self._train.dtype)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Log numbers at the present step; for callbacks."""
        if self.world.is_main:
            self._sink.write(self.step, metrics)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Averaged weights in place (where a role has an average), modules in eval mode, no gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for role, network in self.state.networks.items():
                gather_after(network)
                if role in self.state.averages:
                    stack.enter_context(self.state.averages[role].swapped())
                stack.enter_context(whole(network))
                network.eval()
            try:
                yield
            finally:
                for network in self.state.networks.values():
                    network.train()

    # ---- a leg -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until a signal or the clock ends the leg; a checkpoint is there in any case.

        Raises Diverged, whatever the source or a callback raises, and KeyboardInterrupt at a second Ctrl-C.
        """
        self._began = time.monotonic()
        self._prepare_folder()
        self._window = Window()
        with ExitStack() as stack:
            stack.enter_context(self.stop)
            self._feed = self._open_feed()
            stack.callback(self._feed.close)
            self._sink = Sink(self.out if self.world.is_main else None, start=self.step)
            stack.callback(self._sink.close)
            self._display = Display(self.name, self._train.steps, self.step, shown=self._show)
            stack.callback(self._display.close)
            return self._loop()

    def _loop(self) -> Outcome:
        for callback in self._callbacks:
            callback.on_start(self)
        self._saved_at, self._spent_s, self._logged = time.monotonic(), 0.0, self.step
        reason = None
        while self.step < self._train.steps and reason is None:
            began = time.perf_counter()
            self._step(self._feed.next())
            self._spent_s += time.perf_counter() - began
            if self.step % self._train.log_every == 0 or self.step == self._train.steps:
                self._log()
            self._display.update(self.step)
            reason = self._between_steps()
        if self._saved_step != self.step:
            self._save()
        is_done = self.step >= self._train.steps
        if is_done:
            self._finish()
        last = find(self.out)
        assert last is not None
        return Outcome(step=self.step, is_done=is_done, reason=reason or "all steps are done", checkpoint=last.path)

    def _between_steps(self) -> str | None:
        """Save where it is due, call the callbacks; why the leg is to end, if it is. All ranks decide the same."""
        train, minutes = self._train, (time.monotonic() - self._saved_at) / 60
        by_time = self.world.is_main and 0 < train.save_minutes <= minutes
        saves, signals = self.world.sum([by_time, self.stop.by_signal]).tolist()
        if saves or (train.save_every and self.step % train.save_every == 0):
            self._save()
        if not signals or self.step == self._train.steps:  # whoever sent it does not wait long
            for callback in self._callbacks:
                callback.on_step(self)
        own = self.stop.reason
        return (own or "another rank was stopped") if self.world.sum([own is not None]).item() else None

    def _finish(self) -> None:
        if self.world.is_main:
            for role in self.state.networks:
                export_weights(self.out, self.out / f"{role}.safetensors", role=role)
        self.world.agree(None)
        for callback in self._callbacks:
            callback.on_end(self)

    # ---- a step ------------------------------------------------------------------------------------------------

    def _step(self, batches: Sequence[Batch]) -> None:
        moved = [to_device(batch, self.device) for batch in batches]
        good = {role: self._role_step(role, moved) for role in self.method.roles(self.step)}
        self.state.step += 1
        self.state.skipped += not all(good.values())
        bad = self.state.bad_in_a_row  # of each role: one that seldom acts is not excused by others that do well
        bad.update({role: 0 if is_good else bad[role] + 1 for role, is_good in good.items()})
        worst = max(bad, key=lambda role: bad[role])
        if bad[worst] >= self._train.max_bad_steps:
            raise Diverged(
                f"loss or gradient of the {worst} was not finite in {bad[worst]} updates in a row, up to step "
                f"{self.step}; the last checkpoint is from before; lower optim.lr, or look at the data"
            )

    def _role_step(self, role: str, batches: Sequence[Batch]) -> bool:
        """Update one role; False, and no update, where loss or gradient is not finite on any rank."""
        network, optimizer = self.state.networks[role], self.state.optimizers[role]
        losses, metrics = self._backward(role, batches)
        gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
        if not gradients:
            raise ValueError(f"the loss of {role!r} gave no gradient to any of its parameters")
        norm = global_norm(gradients)
        finite = torch.isfinite(norm) & torch.isfinite(torch.stack(losses)).all()
        is_good = int(self.world.sum([float(finite)]).item()) == self.world.size
        if is_good:
            if self._train.clip_norm is not None:
                scale = (self._train.clip_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([local(g) for g in gradients], scale)
            factor = lr_factor(optimizer.config, self.step, self._train.steps)
            optimizer.step(factor)
            if role in self.state.averages:
                self.state.averages[role].update(self.state.updates[role])
            self.state.updates[role] += 1
            self.state.follow(role)
            prefix = "" if role == "student" else f"{role}/"
            for values in metrics:
                self._window.add({prefix + name: value for name, value in values.items()})
            self._window.add({f"{prefix}grad_norm": norm, f"{prefix}lr": optimizer.config.lr * factor})
        for own in self.state.optimizers.values():
            own.zero_grad()
        gather_after(network)
        return is_good

    def _backward(self, role: str, batches: Sequence[Batch]) -> tuple[list[Tensor], list[Mapping[str, Tensor | float]]]:
        """Gradients of the mean over all micro-batches, and what they gave."""
        losses, metrics = [], []
        seed, parts = self._train.seed, self.world.size
        for micro, batch in enumerate(batches):
            samples = self._feed.samples(micro)
            seed_step(seed, self.step, role, self.world.rank + parts * micro, self.device)
            rng = step_rng(seed, self.step, role, samples)
            for network in self.state.networks.values():
                sync_gradients(network, micro == len(batches) - 1)
            with self.autocast():
                result = self.method.step(batch, role, self.step, rng)
            (result.loss / len(batches)).backward()
            losses.append(result.loss.detach())
            metrics.append(result.metrics)
        return losses, metrics

    # ---- files -------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if self.world.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(to_yaml(self.recipe), encoding="utf-8")
        self.world.agree(None)

    def _open_feed(self) -> Feed:
        train = self._train
        return Feed(self._source, self.world, size=train.batch, accumulate=train.accumulate, start=self.step,
                    stop=train.steps, workers=train.workers, ahead=train.ahead)  # fmt: skip

    def _log(self) -> None:
        means = self._window.means(self.world)
        steps, seconds = max(self.step - self._logged, 1), max(self._spent_s, 1e-9)
        means["samples_per_s"] = steps * self._train.batch / seconds
        means["step_s"] = seconds / steps
        means["data_wait_share"] = self._feed.waited_s / seconds
        means["skipped_steps"] = float(self.state.skipped)
        if self.device.type == "cuda":
            means["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._feed.waited_s, self._spent_s, self._logged = 0.0, 0.0, self.step
        self.write(means)
        self._display.update(self.step, means)

    def _save(self) -> Path:
        if self._saved_step == self.step:
            found = find(self.out)
            assert found is not None
            return found.path
        state = {
            "recipe": self.name,
            "class": type(self.recipe).__qualname__,
            "config": to_dict(self.recipe),
            "seed": self._train.seed,
            "seconds": self.seconds,
            CODEC: getattr(self._source, "codec_sha256", None),
            "counters": self.state.counters(),
        }
        path = save(self.out, self.step, self.state.tensors(), state, self.world, keep=self._train.keep)
        self._saved_step, self._saved_at = self.step, time.monotonic()
        for callback in self._callbacks:
            callback.on_save(self, path)
        return path


def find_start(out: Path, resume: str | os.PathLike[str]) -> Saved | None:
    """The checkpoint that a leg in `out` begins with. Raises ValueError where `resume` does not fit what is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: got a file; expected a folder for the run")
    here = find(out) if out.is_dir() else None
    if resume == "auto":
        return here
    if resume == "never":
        if here is not None:
            raise ValueError(f"{out} already holds a run at step {here.step}; use another --out, or --resume auto")
        return None
    found = find(Path(resume))
    if found is None:
        raise ValueError(f"{resume} holds no checkpoint; expected a run or one of its checkpoints")
    if here is not None and found.path.parent.resolve() != here.path.parent.resolve():
        raise ValueError(f"{out} already holds another run at step {here.step}; use another --out with --resume PATH")
    return found
