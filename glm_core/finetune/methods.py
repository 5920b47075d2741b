"""What of a model is trained, how its loss is computed, and in which files the result is kept.

Four methods: P-tuning v2 (arXiv:2110.07602), LoRA (arXiv:2106.09685), the last layers alone, and everything.
Trained weights are fp32 whatever the base is in, because a step of the optimiser is smaller than what half precision
resolves. Hidden states go through the output head only where a token counts in the loss, a few rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..checkpoints import LoadedModel, read_config
from ..errors import GLMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Kind = Literal["p-tuning-v2", "lora", "freeze", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# fp32 weights beside a checkpoint whose own weights are rounded to bf16 or fp16.
EXACT_WEIGHTS = "trainable.safetensors"
# Logits computed at a time: on the CPU they have to stay in the cache, elsewhere 256 MB keep a GPU busy.
LOGITS_AT_A_TIME = {"cpu": 1 << 23}
LOGITS_ELSEWHERE = 1 << 26
IGNORED = -100  # label of a token that does not count


@dataclass(frozen=True)
class Method:
    """What is trained, with the settings of its kind; settings of other kinds have no effect."""

    kind: Kind = "lora"
    prefix_length: int = 128
    prefix_projection: bool = False
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = ("query_key_value",)  # names of the model, or of the released layout
    freeze_layers: int = 3  # how many of the last layers are trained
    freeze_what: Literal["mlp", "layer"] = "mlp"

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return asdict(self) | {"lora_targets": list(self.lora_targets)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Method:
        """The settings `to_json` gave; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        if "lora_targets" in values:
            values["lora_targets"] = tuple(values["lora_targets"])
        return cls(**values)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the settings, each with what to do."""
        found: list[tuple[str, str]] = []
        if self.kind not in KINDS:
            found.append((f"Method {self.kind!r} is unknown.", f"Choose one of {', '.join(KINDS)}."))
        for name, value, concerns in (
            ("prefix_length", self.prefix_length, "p-tuning-v2"),
            ("lora_rank", self.lora_rank, "lora"),
            ("freeze_layers", self.freeze_layers, "freeze"),
        ):
            if self.kind == concerns and value < 1:
                found.append((f"{name} is {value}.", "Choose at least 1."))
        if self.kind == "lora" and not 0 <= self.lora_dropout < 1:
            found.append((f"lora_dropout is {self.lora_dropout}.", "Choose at least 0 and less than 1."))
        if self.kind == "freeze" and self.freeze_what not in ("mlp", "layer"):
            found.append((f"freeze_what is {self.freeze_what!r}.", "Choose mlp or layer."))
        return found


def attach(
    loaded: LoadedModel, method: Method, precision: str | None = None, seed: int = 42, base: str | None = None
) -> Trainee:
    """Make a loaded model trainable by a method; random first weights depend on the seed alone.

    precision  what is computed in: as loaded where not given. A model in fp32 may be trained in bf16 or fp16, one
               in bf16 or fp16 also in fp32; INT8 and INT4 stay as they are
    base       name or path of the base to record in an adapter's files; its folder where not given
    GLMError for settings that do not fit the model, for full and freeze over INT8/INT4, and for a model that
    carries an adapter already.
    """
    import torch

    for message, todo in method.problems():
        raise GLMError(message, todo)
    if loaded.prefix is not None or hasattr(loaded.model, "peft_config"):
        raise GLMError(
            f"{loaded.info.name} carries an adapter already.",
            "Load its base alone, or merge the adapter into it first.",
        )
    quantized = _is_quantized(loaded.model)
    if quantized and method.kind in ("full", "freeze"):
        raise GLMError(
            f"The weights are INT8/INT4 codes, which {method.kind} fine-tuning cannot change.",
            "Load the model in bf16 or fp32, or choose lora or p-tuning-v2.",
        )
    chosen = loaded.precision if precision in (None, "auto") or quantized else precision
    if chosen not in ("fp32", "bf16", "fp16") and not quantized:
        raise GLMError(
            f"The model is loaded in {loaded.precision} and cannot be trained in {chosen}.",
            f"Load it in {chosen}.",
        )
    devices = [loaded.device.index or 0] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        make = {"p-tuning-v2": PrefixTrainee, "lora": LoraTrainee}.get(method.kind, WeightsTrainee)
        return make(loaded, method, chosen, base or str((loaded.base or loaded.info).path))


def _is_quantized(model: nn.Module) -> bool:
    from ..quantization import RowwiseLinear

    return any(isinstance(module, RowwiseLinear) for module in model.modules())


class Trainee:
    """A model with some of its weights, or some beside it, open to training.

    model       called as model(input_ids=..., labels=...), gives .loss and .logits as any model of transformers
    parameters  name -> the trained fp32 parameters, in a fixed order
    precision   what is computed in
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]

    def __init__(self, loaded: LoadedModel, method: Method, precision: str, base: str) -> None:
        self.loaded, self.method, self.precision, self.base = loaded, method, precision, base
        self.device: torch.device = loaded.device
        self._autocast: torch.dtype | None = None
        self._head: Any = loaded.model.get_output_embeddings()
        self._body: Any = loaded.model.base_model
        self._whole = False
        self._options: dict[str, Any] = {"use_cache": False}

    @property
    def trainable_count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def scaled(self) -> bool:
        """Whether gradients pass through fp16, so that the loss has to be scaled up to keep them from zero."""
        import torch

        return self.precision == "fp16" and torch.float16 in (self._autocast, self.loaded.model.dtype)

    def computing(self) -> AbstractContextManager[Any]:
        """The context that the forward pass belongs into."""
        import torch

        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    def training(self, dropout: bool = True, checkpointing: bool = False) -> None:
        """Switch to training: dropout on or off, layers recomputed in the backward pass instead of kept or not."""
        from torch import nn

        self.model.train()
        self._body.train()
        if not dropout:
            for module in [*self.model.modules(), *self._body.modules()]:
                if isinstance(module, nn.Dropout):
                    module.eval()
        if checkpointing:
            self.loaded.model.activation_checkpointing_enable()

    def evaluating(self) -> None:
        """Switch training off; the model answers as it will when loaded from its files."""
        self.model.eval()
        self._body.eval()
        if getattr(self.loaded.model, "is_activation_checkpointing", False):
            self.loaded.model.activation_checkpointing_disable()

    def backward(self, ids: Tensor, labels: Tensor, factor: float | Tensor) -> Tensor:
        """Add the gradients of factor * the summed cross entropy of one batch; returns the sum, fp32, without factor.

        ids, labels  (rows, columns), padded on the right; a label is predicted by the column before it, and -100
                     does not count
        The head is done first, some rows at a time and each with its own backward pass, so the logits of a batch
        are never in memory together.
        """
        import torch
        import torch.nn.functional as F

        with self.computing():
            hidden, targets = self._hidden(ids, labels)
        total = torch.zeros((), device=ids.device)
        if not len(targets):
            return total
        if self._whole:
            loss = F.cross_entropy(hidden.float(), targets, reduction="sum")
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            return total + loss.detach()
        gradient = torch.empty_like(hidden)
        for rows in self._parts(len(targets)):
            part = hidden[rows].detach().requires_grad_()
            with self.computing():
                logits = self._head(part)
            loss = F.cross_entropy(logits.float(), targets[rows], reduction="sum")
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            assert part.grad is not None
            gradient[rows] = part.grad
            total += loss.detach()
            del logits, loss
        if hidden.requires_grad:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return total

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The summed cross entropy of a batch in fp32, without gradients; arguments as for `backward`."""
        import torch
        import torch.nn.functional as F

        total = torch.zeros((), device=ids.device)
        with torch.no_grad(), self.computing():
            hidden, targets = self._hidden(ids, labels)
            for rows in self._parts(len(targets)):
                logits = hidden[rows] if self._whole else self._head(hidden[rows])
                total += F.cross_entropy(logits.float(), targets[rows], reduction="sum")
        return total

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], longest: int, pad_id: int
    ) -> list[list[int]]:
        """The most likely continuation of a few prompts as the training stands, up to `longest` ids, without its end.

        Nothing is cached, since a model under training may have no cache: for a look at short answers only.
        """
        import torch

        rows, found = [list(one) for one in prompts], [list[int]() for _ in prompts]
        going = list(range(len(rows)))
        while going and len(found[going[0]]) < longest:
            width = max(len(rows[i]) for i in going) + 1
            ids = torch.full((len(going), width), pad_id, dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            for place, i in enumerate(going):
                ids[place, : len(rows[i])] = torch.as_tensor(rows[i], dtype=torch.long)
                labels[place, len(rows[i])] = pad_id  # the column before it is the one to be read
            with torch.no_grad(), self.computing():
                hidden, _ = self._hidden(ids.to(self.device), labels.to(self.device))
                chosen = (hidden if self._whole else self._head(hidden)).argmax(-1).tolist()
            for i, token in zip(tuple(going), chosen, strict=True):
                if token in stop_ids:
                    going.remove(i)
                else:
                    rows[i].append(token)
                    found[i].append(token)
        return found

    def _hidden(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the head turns into predictions of the tokens that count, (n, width), and these tokens, (n,).

        No mask is passed: padding stands behind every real token, and no model here looks ahead of a prompt's end.
        """
        counted = labels[:, 1:] != IGNORED
        out = self._body(input_ids=ids, **self._options)
        states = out.logits if self._whole else out.last_hidden_state
        return states[:, :-1][counted], labels[:, 1:][counted]

    def _parts(self, count: int) -> list[slice]:
        config = self.loaded.model.config
        budget = LOGITS_AT_A_TIME.get(self.device.type, LOGITS_ELSEWHERE)
        step = max(64, budget // int(config.vocab_size))
        return [slice(start, start + step) for start in range(0, count, step)]

    def _check_head(self) -> None:
        """Use the model's own forward where its logits are more than the head's product, as in Gemma or Cohere."""
        import torch

        if self.loaded.info.architecture in ("chatglm", "chatglm2"):
            return
        ids = torch.arange(3, 11, device=self.device)[None]
        with torch.no_grad(), self.computing():
            whole = self.loaded.model(input_ids=ids, use_cache=False).logits.float()
            ours = self._head(self._body(input_ids=ids, use_cache=False).last_hidden_state).float()
        if ours.shape != whole.shape or not torch.allclose(ours, whole, rtol=1e-2, atol=1e-2):
            self._whole, self._body = True, self.loaded.model

    def _float(self) -> None:
        """A base in half precision that is to be trained in fp32, or one in fp32 to be computed in half of it."""
        import torch

        model, own = self.loaded.model, self.loaded.precision
        if own == self.precision or self.precision not in ("fp32", "bf16", "fp16"):
            return
        if self.precision == "fp32":
            model.float()
        elif own == "fp32":
            self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        else:
            raise GLMError(
                f"The model is loaded in {own} and cannot be trained in {self.precision}.",
                f"Load it in {self.precision}.",
            )

    def save(self, folder: str | Path, exact: bool = False) -> None:
        """Write what was trained into a new folder that `glm_core.checkpoints.load` reads.

        exact  also keep the fp32 weights where the files would only hold rounded ones, to train on from them
        """
        raise NotImplementedError

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote, to train on; GLMError where the files are for another model or method."""
        raise NotImplementedError

    def detach(self) -> None:
        """End the training: an adapter is taken off its base; weights that were trained stay as they are now."""
        raise NotImplementedError

    def _take(self, found: Mapping[str, Tensor], folder: str | Path) -> None:
        """Copy tensors by name into the trained parameters."""
        import torch

        for name, parameter in self.parameters.items():
            tensor = found.get(name)
            if tensor is None or tensor.shape != parameter.shape:
                what = "no" if tensor is None else f"{list(tensor.shape)} as"
                raise GLMError(
                    f"{folder} has {what} {name}; the training needs {list(parameter.shape)}.",
                    "Resume with the base and the method it was started with.",
                )
            with torch.no_grad():
                parameter.copy_(tensor)


class PrefixTrainee(Trainee):
    """P-tuning v2: columns of keys and values in front of a frozen model."""

    def __init__(self, loaded: LoadedModel, method: Method, precision: str, base: str) -> None:
        from ..adapters import BaseShape, PrefixEncoder, PrefixModel

        super().__init__(loaded, method, precision, base)
        if loaded.info.architecture not in ("chatglm", "chatglm2"):
            raise GLMError(
                f"P-tuning v2 is for ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM-4; {loaded.info.name} is "
                f"{loaded.info.family}.",
                "Choose lora.",
            )
        self._float()
        shape = BaseShape.of(loaded.model.config)
        self.encoder = PrefixEncoder(shape, method.prefix_length, method.prefix_projection).to(self.device)
        self.model = PrefixModel(loaded.model, self.encoder)
        self._body = PrefixModel(loaded.model.base_model, self.encoder)
        self._options = {}
        self.parameters = dict(self.encoder.named_parameters())

    def save(self, folder: str | Path, exact: bool = False) -> None:
        from ..adapters import save_prefix

        config = read_config((self.loaded.base or self.loaded.info).path)
        config.pop("auto_map", None)  # points at code that this product never runs
        save_prefix(self.encoder, folder, config | {"_name_or_path": self.base})

    def load(self, folder: str | Path) -> None:
        from ..adapters import load_prefix

        self._take(dict(load_prefix(folder, self.loaded.model.config).named_parameters()), folder)

    def detach(self) -> None:
        self.evaluating()
        self.encoder.requires_grad_(False)


class LoraTrainee(Trainee):
    """LoRA: a low-rank product beside linear layers of a frozen model."""

    def __init__(self, loaded: LoadedModel, method: Method, precision: str, base: str) -> None:
        from ..adapters import add_lora

        super().__init__(loaded, method, precision, base)
        self._float()
        model = loaded.model.requires_grad_(False)
        self._check_head()
        add_lora(
            model,
            rank=method.lora_rank,
            alpha=method.lora_alpha,
            dropout=method.lora_dropout,
            targets=method.lora_targets,
        )
        model.peft_config["default"].base_model_name_or_path = base
        self.model = model
        self._head = model.get_output_embeddings()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def save(self, folder: str | Path, exact: bool = False) -> None:
        from ..adapters import save_lora

        save_lora(self.loaded.model, folder)

    def load(self, folder: str | Path) -> None:
        from .. import weights
        from ..adapters import LORA_WEIGHTS

        files = [Path(folder) / name for name in LORA_WEIGHTS if (Path(folder) / name).is_file()]
        found = {
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
            for name, tensor in weights.tensors(files[:1])
        }
        self._take(found, folder)

    def save_released(self, folder: str | Path) -> None:
        """Write the adapter for the released ChatGLM2/3 code, whose query_key_value is one layer.

        There A and B of three projections become one pair of three times the rank, B with zeros off its blocks; other
        layers are filled up with zeros to that rank, so that r and alpha are the same for all. For ChatGLM-6B, whose
        layers are named as released, this is `save`.
        """
        import torch
        from safetensors.torch import save_file

        from ..adapters import LORA_WEIGHTS, RELEASED_LINEARS

        self.save(folder)
        if self.loaded.info.architecture != "chatglm2":
            return
        rank = self.method.lora_rank
        given = {name: p.detach().cpu() for name, p in self.parameters.items()}
        tensors: dict[str, Tensor] = {}
        for layer in range(self.loaded.model.config.num_hidden_layers):
            for old, parts in RELEASED_LINEARS.items():
                a, b = [], []
                for number, part in enumerate(parts):
                    module = f"model.layers.{layer}.{part}"
                    linear: Any = self.loaded.model.get_submodule(module)
                    own = given.pop(f"{module}.lora_A.default.weight", torch.zeros(rank, linear.in_features))
                    wide = torch.zeros(linear.out_features, 3 * rank)
                    if (side := given.pop(f"{module}.lora_B.default.weight", None)) is not None:
                        wide[:, number * rank : (number + 1) * rank] = side
                    a.append(own)
                    b.append(wide)
                down, up = torch.cat(a), torch.cat(b)
                if not bool(down.any()):
                    continue  # not adapted
                down = torch.nn.functional.pad(down, (0, 0, 0, 3 * rank - len(down)))
                name = f"base_model.model.transformer.encoder.layers.{layer}.{old}"
                tensors |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up}
        if given:
            raise GLMError(
                f"The adapter sits on {next(iter(given)).split('.lora_')[0]}, which the released layout has no name for.",
                "Choose lora_targets among query_key_value, dense, dense_h_to_4h and dense_4h_to_h.",
            )
        save_file(tensors, Path(folder) / LORA_WEIGHTS[0], metadata={"format": "pt"})
        path = Path(folder) / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"r": 3 * rank, "lora_alpha": 3 * self.method.lora_alpha}
        config["target_modules"] = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def detach(self) -> None:
        from ..adapters import unload_lora

        self.evaluating()
        unload_lora(self.loaded.model)


class WeightsTrainee(Trainee):
    """The model's own weights, all of them or those of the last layers; in fp32 while they are trained."""

    def __init__(self, loaded: LoadedModel, method: Method, precision: str, base: str) -> None:
        import torch

        super().__init__(loaded, method, precision, base)
        model = loaded.model
        if precision == "fp32":
            model.float()
        else:
            self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.model = model
        self._check_head()
        model.requires_grad_(False)
        parts: list[nn.Module] = [model]
        if method.kind == "freeze":
            parts = _last_layers(model, method.freeze_layers)
            if method.freeze_what == "mlp":
                parts = [layer.get_submodule("mlp") for layer in parts]
        for part in parts:
            part.requires_grad_(True)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def save(self, folder: str | Path, exact: bool = False) -> None:
        from safetensors.torch import save_file

        from ..checkpoints import save

        rounded: Any = _Rounded(self.loaded.model, self.precision)
        save(replace(self.loaded, model=rounded, precision=self.precision), folder)
        if exact and self.precision != "fp32":
            state = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            save_file(state, Path(folder) / EXACT_WEIGHTS)

    def load(self, folder: str | Path) -> None:
        from .. import weights
        from ..models import released

        folder = Path(folder)
        found: dict[str, Tensor] = {}
        if (folder / EXACT_WEIGHTS).is_file():
            found = dict(weights.tensors([folder / EXACT_WEIGHTS]))
        else:
            files, problems = weights.weight_files(folder)
            if problems:
                raise GLMError(
                    f"{folder} cannot be read. {' '.join(problems)}", "Resume from another checkpoint."
                )
            config = self.loaded.model.config
            own = self.loaded.info.architecture not in ("chatglm", "chatglm2")
            for name, tensor in weights.tensors(files):
                for target, part in [(name, tensor)] if own else released.to_native(name, tensor, config):
                    if target in self.parameters:
                        found[target] = part
        self._take(found, folder)

    def detach(self) -> None:
        import torch

        self.evaluating()
        self.loaded.model.requires_grad_(False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.loaded.precision)
        if dtype is not None:
            self.loaded.model.to(dtype)


class _Rounded:
    """A model as its checkpoint is written: every weight in one precision, one tensor at a time."""

    def __init__(self, model: Any, precision: str) -> None:
        import torch

        self._model = model
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        self.config = model.config

    def parameters(self) -> Any:
        return self._model.parameters()

    def modules(self) -> Any:
        return self._model.modules()

    def state_dict(self) -> Mapping[str, Tensor]:
        return _RoundedState(self._model.state_dict(), self._dtype)


class _RoundedState(Mapping[str, Any]):
    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._state, self._dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Any:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _last_layers(model: Any, count: int) -> list[Any]:
    layers = list(getattr(model.base_model, "layers", ()))
    if count > len(layers):
        raise GLMError(
            f"freeze_layers is {count}; the model has {len(layers)} layers.", f"Choose 1 to {len(layers)}."
        )
    return layers[-count:]
