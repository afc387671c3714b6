"""DeepSpeed ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and weights in flat ranges over the ranks.

A rank holds weights in the compute precision, an fp32 copy of its own ranges, and both Adam moments. DeepSpeed reduces,
clips and updates; megagpt decides precision, batch, clipping and loss scale.
"""

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.engines.deepspeed_library import load_deepspeed
from megagpt.engines.engine import DTYPES, Engine, build_optimizer, prepare_model, scaled
from megagpt.engines.flat_shard import FlatShard
from megagpt.engines.zero_config import check_nvme, deepspeed_config
from megagpt.errors import UserError
from megagpt.models.gpt import GPT, Block
from megagpt.models.initialization import initial_values
from megagpt.world import World


class ZeroEngine(Engine):
    """Stages 1 and 2 hold all weights on every rank; at stage 3 they are partitioned as the model is built."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        on_gpu = world.device.type == "cuda"
        self._settings = deepspeed_config(config, world.size, on_gpu)
        if config.engine.nvme_path:
            check_nvme(config.engine.nvme_path, on_gpu)
        deepspeed = load_deepspeed(on_gpu)
        accelerator = deepspeed.get_accelerator()
        runs = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
        if config.train.precision in runs and not runs[config.train.precision]():
            raise UserError(
                f"train.precision {config.train.precision}: DeepSpeed does not support it on this {world.device.type}; "
                "use another precision, or another engine.name"
            )
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed reads it under any launcher
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.model = self._build(deepspeed)
        optimizer = build_optimizer(self.model, config)
        self.clock = prepare_model(self.model, config, world.device)
        self._engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self._settings, dist_init_required=False
        )
        self._shards: _WholeWeights | _PartitionedWeights | _SwappedWeights
        if config.engine.stage < 3:
            self._shards = _WholeWeights(self._engine, self.model)
        else:
            kind = _SwappedWeights if config.engine.nvme_path else _PartitionedWeights
            self._shards = kind(self._engine, self.model)
        self.optimizer = self._engine.optimizer.optimizer
        self._initialize()

    def _build(self, deepspeed: Any) -> GPT:
        config, device = self.config, self.world.device
        if config.engine.stage < 3:
            with torch.device("meta"):
                model = GPT(config.model)
            # Zeroed, because DeepSpeed broadcasts the values: uninitialized memory may hold NaN.
            return model.to(DTYPES[config.train.precision]).to_empty(device=device).apply(_zero)
        with deepspeed.zero.Init(config_dict_or_path=self._settings):
            model = GPT(config.model)
        # Weights are gathered block by block, as under FSDP, so a block contains no communication: compiled graphs and
        # selective activation checkpointing need that.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
        # The decoder also uses the embedding's weight as its head, outside the embedding's own forward pass.
        deepspeed.zero.register_external_parameter(model, model.token_embedding.weight)
        return model

    @torch.no_grad()
    def _initialize(self) -> None:
        state = self.state()
        for key, shard in state.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                stop = shard.start + shard.flat.numel()
                values = initial_values(
                    name, tuple(shard.shape), self.config.model, self.config.run.seed, shard.start, stop
                )
                shard.flat.copy_(values)
            else:
                shard.flat.zero_()
        self._state_loaded(0)

    def _accumulate(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        if self.loss_scale.dynamic:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(tokens, targets)
        self._engine.backward(scaled(loss, scale), scale_wrt_gas=False)
        return loss.detach()

    def _update(self) -> float:
        # Clips by the global norm; leaves the weights unchanged if the norm is not finite.
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> dict[str, FlatShard]:
        self._shards.make_moments()
        state: dict[str, FlatShard] = {}
        for name, parameter in self.model.named_parameters():
            for kind in ("model", "exp_avg", "exp_avg_sq"):
                state[f"{kind}.{name}"] = self._shards.shard(parameter, None if kind == "model" else kind)
        return state

    def _state_loaded(self, updates: int) -> None:
        self._shards.publish()
        for moments in self.optimizer.state.values():
            moments["step"] = torch.full((), float(updates), device=moments["exp_avg"].device)

    def describe(self) -> str:
        return f"{super().describe()}, stage {self.config.engine.stage}"

    def settings(self) -> dict[str, Any]:
        return self._settings


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


class _WholeWeights:
    """Stages 1 and 2: this rank's part of each parameter, inside DeepSpeed's flat fp32 copy."""

    def __init__(self, engine: Any, model: GPT) -> None:
        self._zero = engine.optimizer
        # BF16_Optimizer, which stage 1 uses in bf16, has another name for the flat copies.
        self._flats: list[Tensor] = getattr(
            self._zero, "single_partition_of_fp32_groups", getattr(self._zero, "fp32_groups_flat_partition", [])
        )

    def make_moments(self) -> None:
        """Make moments of zero for parameters never updated; rebuild DeepSpeed's map from parameters to moments."""
        for flat in self._flats:
            _make_moments(self._zero.optimizer, flat)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def shard(self, parameter: nn.Parameter, moment: str | None) -> FlatShard:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # this rank holds no part of the parameter
            return FlatShard(torch.empty(0), tuple(parameter.shape), 0)
        flat = mapping.get_hp_fragment(moment).detach()
        return FlatShard(flat, tuple(parameter.shape), mapping.lp_fragment_address.start)

    def publish(self) -> None:
        """Set the weights of every rank from the fp32 copies."""
        self._zero.update_lp_params()


class _PartitionedWeights:
    """Stage 3: each parameter is cut into equal flat ranges, the last of them shorter."""

    def __init__(self, engine: Any, model: GPT) -> None:
        self._zero = engine.optimizer
        self._model = model

    def make_moments(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            _make_moments(self._zero.optimizer, flat)

    def shard(self, parameter: nn.Parameter, moment: str | None) -> FlatShard:
        p: Any = parameter
        size = p.partition_numel()
        start = self._zero._get_param_partition_rank(p) * size
        held = max(0, min(size, p.ds_numel - start))
        whole, _ = self._zero._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=moment)
        return FlatShard(whole.detach().narrow(0, 0, held), tuple(p.ds_shape), start)

    @torch.no_grad()
    def publish(self) -> None:
        zero = self._zero
        zero.invalidate_secondary_tensor()  # ZeRO++'s second copy of the weights
        for i, fp32 in enumerate(zero.fp32_partitioned_groups_flat):
            low = zero.fp16_partitioned_groups_flat[i]
            low.data.copy_(fp32.data)
            for part, new in zip(
                zero.fp16_partitioned_groups[i], zero.unflatten(low, zero.fp16_partitioned_groups[i]), strict=True
            ):
                part.data = new.data
        self._refresh_whole()

    def _refresh_whole(self) -> None:
        # Small parameters stay whole on every rank: drop them and gather them again.
        whole = [p for p in self._model.parameters() if p.ds_persist]  # type: ignore[attr-defined]
        if whole:
            first: Any = whole[0]
            first.partition(param_list=whole, has_been_updated=False)
            first.all_gather(whole)


class _SwappedWeights(_PartitionedWeights):
    """Stage 3 with optimizer state on a disk. `shard` gives a copy in memory; `publish` writes the copies still in
    use back to the disk."""

    def __init__(self, engine: Any, model: GPT) -> None:
        super().__init__(engine, model)
        self._read: list[tuple[nn.Parameter, str | None, weakref.ref[FlatShard]]] = []

    def make_moments(self) -> None:
        self._read = []
        zero = self._zero
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            swapped = zero._swappable_optimizer_subgroup(i)  # small groups stay in memory
            if swapped and "exp_avg" not in zero.optimizer.state[flat]:
                zero._optimizer_states_and_gradient_swap_in(i)
                _make_moments(zero.optimizer, flat)
                zero._optimizer_states_and_gradient_swap_out(i)
            elif not swapped:
                _make_moments(zero.optimizer, flat)

    def shard(self, parameter: nn.Parameter, moment: str | None) -> FlatShard:
        p: Any = parameter
        size = p.partition_numel()
        start = self._zero._get_param_partition_rank(p) * size
        copy = self._zero.get_local_fp32_param(p, moment).detach().clone()
        shard = FlatShard(copy.narrow(0, 0, max(0, min(size, p.ds_numel - start))), tuple(p.ds_shape), start)
        self._read.append((parameter, moment, weakref.ref(shard)))
        return shard

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, moment, reference in self._read:
            shard = reference()
            if shard is None:
                continue
            whole = shard.flat._base  # with the padding of the last range
            self._zero.set_local_hp_param(whole, parameter, moment)
            if moment is None:
                parameter.ds_tensor.data.copy_(whole)  # type: ignore[attr-defined]
        self._read = []
        self._refresh_whole()


def _make_moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> None:
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
