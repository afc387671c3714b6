"""DeepSpeed ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and weights are cut into flat ranges over the
ranks. A rank holds weights in the compute precision, an fp32 copy of its own ranges, and both Adam moments. DeepSpeed
reduces, clips and updates; megagpt decides precision, batch, clipping norm and loss scale."""

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.engines.deepspeed_library import load_deepspeed
from megagpt.engines.engine import DTYPES, MOMENTS, Engine, build_optimizer, moments_of, prepare_model
from megagpt.engines.flat_shard import FlatShard, parts_of
from megagpt.engines.zero_config import check_nvme, deepspeed_config
from megagpt.engines.zero_settings import check_on_cpu, refusals
from megagpt.engines.zero_tensor_ranks import ModelParallelUnit, model_parallel_unit, share_gradients
from megagpt.errors import UserError
from megagpt.models.gpt import GPT, Block
from megagpt.models.tensor_parallel import TensorRanks
from megagpt.world import World


class ZeroEngine(Engine):
    """Stages 1 and 2 hold all weights on every rank; at stage 3 they are partitioned as the model is built."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        on_gpu = world.device.type == "cuda"
        self._settings = deepspeed_config(config, world.size, on_gpu)
        if not on_gpu:
            check_on_cpu(self._settings)
        if config.engine.nvme_path:
            check_nvme(config.engine.nvme_path, on_gpu)
        deepspeed = load_deepspeed(on_gpu)
        accelerator = deepspeed.get_accelerator()
        runs = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
        if config.train.precision in runs and not runs[config.train.precision]():
            problem = f"DeepSpeed does not support it on this {world.device.type}"
            advice = "use another precision, or another engine.name"
            raise UserError(f"train.precision {config.train.precision}: {problem}; {advice}")
        # DeepSpeed takes the GPU of this number, under any launcher.
        index = world.device.index
        os.environ["LOCAL_RANK"] = str(world.local_rank if index is None else index)
        deepspeed.init_distributed(auto_mpi_discovery=False)
        unit = model_parallel_unit(config, world)
        # DeepSpeed keeps one for the whole process, and would use that of an earlier engine.
        deepspeed.utils.groups.mpu = unit
        if unit is not None:
            self.ranks = unit.ranks
        with refusals(config):
            self.model = self._build(deepspeed, unit)
            if unit is not None:
                share_gradients(self.model, unit)
            self.clock = prepare_model(self.model, config, world.device, self.compiled)
            parts = {"model": self.model, "optimizer": build_optimizer(self.model, config), "mpu": unit}
            self._engine, *_ = deepspeed.initialize(**parts, config=self._settings, dist_init_required=False)
        shards: type[_WholeWeights | _PartitionedWeights] = _WholeWeights
        if config.engine.stage == 3:
            shards = _SwappedWeights if config.engine.nvme_path else _PartitionedWeights
        self._shards = shards(self._engine.optimizer, self.model, self.ranks)
        self.optimizer = self._engine.optimizer.optimizer

    def _build(self, deepspeed: Any, unit: ModelParallelUnit | None) -> GPT:
        config = self.config
        if config.engine.stage < 3:
            with torch.device("meta"):
                model = GPT(config.model, self.ranks).to(DTYPES[config.train.precision])
            # Zeroed, because DeepSpeed broadcasts the values: uninitialized memory may hold NaN.
            for parameter in model.to_empty(device=self.world.device).parameters():
                nn.init.zeros_(parameter)
            return model
        group = None if unit is None else unit.get_data_parallel_group()
        with deepspeed.zero.Init(config_dict_or_path=self._settings, data_parallel_group=group, mpu=unit):
            model = GPT(config.model, self.ranks)
        # Weights are gathered block by block, as under FSDP, and not inside a block: compiled graphs and selective
        # activation checkpointing need that.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
        # The decoder looks both tables up by itself, and uses one of them as its head.
        for table in (model.token_embedding, model.position_embedding):
            deepspeed.zero.register_external_parameter(model, table.weight)
        return model

    def _accumulate(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        if self.loss_scale.dynamic:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(tokens, targets)
        self._engine.backward(self._scaled(loss, scale, last), scale_wrt_gas=False)
        return loss.detach()

    def _update(self) -> Tensor:
        # Clips by the global norm; leaves the weights unchanged if the norm is not finite.
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64)

    def state(self) -> dict[str, FlatShard]:
        self._shards.make_moments()
        return {
            f"{moment or 'model'}.{name}": self._shards.shard(name, parameter, moment)
            for name, parameter in self.model.named_parameters()
            for moment in (None, *MOMENTS)
        }

    def initialize(self) -> None:
        state = self.state()  # kept until the end: from a disk it is a copy, which is written back while in use
        for key, shard in state.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                self._initialize(name, shard)
            else:
                shard.flat.zero_()
        self._state_loaded(0)

    def _state_loaded(self, updates: int) -> None:
        self._shards.publish()
        for moments in self.optimizer.state.values():
            moments["step"] = torch.full((), float(updates), device=moments["exp_avg"].device)

    def describe(self) -> str:
        return f"{super().describe()}, stage {self.config.engine.stage}"

    def settings(self) -> dict[str, Any]:
        return self._settings


class _WholeWeights:
    """Stages 1 and 2: this rank's part of each parameter, inside DeepSpeed's flat fp32 copy."""

    def __init__(self, zero: Any, model: GPT, ranks: TensorRanks) -> None:
        self._zero, self._ranks = zero, ranks
        # BF16_Optimizer, which stage 1 uses in bf16, has another name for the flat copies.
        others: list[Tensor] = getattr(zero, "fp32_groups_flat_partition", [])
        self._flats = getattr(zero, "single_partition_of_fp32_groups", others)

    def make_moments(self) -> None:
        """Make zero moments for parameters never updated, and rebuild DeepSpeed's map from parameters to moments."""
        for flat in self._flats:
            moments_of(self._zero.optimizer, flat)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def shard(self, name: str, parameter: Any, moment: str | None) -> FlatShard:
        shape, parts = parts_of(name, tuple(parameter.shape), self._ranks)
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank holds nothing of the parameter
            return FlatShard(torch.empty(0), shape, 0, parts)
        flat = mapping.get_hp_fragment(moment).detach()
        return FlatShard(flat, shape, mapping.lp_fragment_address.start, parts)

    def publish(self) -> None:
        """Set the weights of every rank from the fp32 copies."""
        self._zero.update_lp_params()


class _PartitionedWeights:
    """Stage 3: each parameter is cut into equal flat ranges, the last of them shorter."""

    def __init__(self, zero: Any, model: GPT, ranks: TensorRanks) -> None:
        self._zero, self._model, self._ranks = zero, model, ranks

    def make_moments(self) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            moments_of(self._zero.optimizer, flat)

    def shard(self, name: str, parameter: Any, moment: str | None) -> FlatShard:
        shape, parts = parts_of(name, tuple(parameter.ds_shape), self._ranks)
        size = parameter.partition_numel()
        start = self._zero._get_param_partition_rank(parameter) * size
        held = max(0, min(size, parameter.ds_numel - start))
        return FlatShard(self._padded(parameter, moment).narrow(0, 0, held), shape, start, parts)

    def _padded(self, parameter: Any, moment: str | None) -> Tensor:
        """This rank's range, with padding if it is the parameter's last range."""
        options = {"release_swap_buffers": False, "optim_state_key": moment}
        return self._zero._get_fp32_opt_state_partition(parameter, **options)[0].detach()

    @torch.no_grad()
    def publish(self) -> None:
        zero = self._zero
        zero.invalidate_secondary_tensor()  # ZeRO++'s second copy of the weights
        for i, fp32 in enumerate(zero.fp32_partitioned_groups_flat):
            low, parts = zero.fp16_partitioned_groups_flat[i], zero.fp16_partitioned_groups[i]
            low.data.copy_(fp32.data)
            for part, new in zip(parts, zero.unflatten(low, parts), strict=True):
                part.data = new.data
        self._refresh_whole()

    def _refresh_whole(self) -> None:
        # Small parameters stay whole on every rank: drop them and gather them again.
        whole: list[Any] = [p for p in self._model.parameters() if p.ds_persist]  # type: ignore[attr-defined]
        if whole:
            whole[0].partition(param_list=whole, has_been_updated=False)
            whole[0].all_gather(whole)


class _SwappedWeights(_PartitionedWeights):
    """Stage 3 with optimizer state on a disk. `shard` returns a copy in memory; `publish` writes those copies back to
    the disk that are still in use."""

    _read: list[tuple[Any, str | None, weakref.ref[FlatShard]]]

    def make_moments(self) -> None:
        self._read = []
        zero = self._zero
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if "exp_avg" in zero.optimizer.state[flat]:
                continue
            swapped = zero._swappable_optimizer_subgroup(i)  # small groups stay in memory
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(i)
            moments_of(zero.optimizer, flat)
            if swapped:
                zero._optimizer_states_and_gradient_swap_out(i)

    def shard(self, name: str, parameter: Any, moment: str | None) -> FlatShard:
        shard = super().shard(name, parameter, moment)
        self._read.append((parameter, moment, weakref.ref(shard)))
        return shard

    def _padded(self, parameter: Any, moment: str | None) -> Tensor:
        return self._zero.get_local_fp32_param(parameter, moment).detach().clone()

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, moment, reference in self._read:
            if (shard := reference()) is not None:
                padded = shard.flat._base
                self._zero.set_local_hp_param(padded, parameter, moment)
                if moment is None:
                    parameter.ds_tensor.data.copy_(padded)
        self._read = []
        self._refresh_whole()
