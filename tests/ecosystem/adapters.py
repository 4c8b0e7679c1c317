"""Adapters beside each other, and the doors through which they come and go."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from support.training import lora_config
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from ecosystem.case import Case, Figures, Side, adamw, joined, logits_of, loop, lora_of, loss_of, randomise, sgd


def a_second_adapter(side: Side) -> Figures:
    model = side.adapted()
    torch.manual_seed(11)
    model.add_adapter("second", lora_config(r=2, lora_alpha=6))
    model.set_adapter("second")
    fresh = Figures(logits=logits_of(model))
    randomise(model, 5, ".second.")
    trained = loop(model, sgd(model))
    model.save_pretrained(side.folder)
    model.set_adapter("default")
    return joined(fresh, trained, Figures(logits=logits_of(model)))


def the_saved_second_adapter(side: Side) -> Figures:
    a_second_adapter(side)
    again = PeftModel.from_pretrained(side.base(), side.folder / "second")
    return Figures(logits=logits_of(again))


def two_adapters_at_once(side: Side) -> Figures:
    model = side.adapted()
    model.add_adapter("second", lora_config(r=2))
    randomise(model, 5, ".second.")
    model.base_model.set_adapter(["default", "second"])
    return loop(model, sgd(model))


def a_deleted_adapter(side: Side) -> Figures:
    model = side.adapted()
    model.add_adapter("second", lora_config(r=2))
    randomise(model, 5, ".second.")
    model.set_adapter("second")
    first = loop(model, sgd(model), 3)
    model.delete_adapter("second")
    model.set_adapter("default")
    return joined(first, loop(model, sgd(model), 3))


def an_adapter_of_attention_alone(side: Side) -> Figures:
    model = side.adapted()
    model.add_adapter("attention", lora_config(target_parameters=[]))
    randomise(model, 5, ".attention.")
    parts = []
    for name in ("attention", "default", "attention"):
        model.set_adapter(name)
        parts.append(loop(model, sgd(model), 4))
    return joined(*parts)


def _saved(side: Side) -> Any:
    model = side.adapted()
    model.save_pretrained(side.folder / "adapter")
    return side.folder / "adapter"


def transformers_load_adapter(side: Side) -> Figures:
    adapter = _saved(side)
    model = side.base()
    model.load_adapter(str(adapter))
    return Figures(logits=logits_of(model))


def transformers_load_adapter_and_train(side: Side) -> Figures:
    adapter = _saved(side)
    model = side.base()
    model.load_adapter(str(adapter), is_trainable=True)
    return loop(model, sgd(model))


def transformers_add_adapter(side: Side) -> Figures:
    model = side.base()
    torch.manual_seed(1)
    model.add_adapter(lora_config(), adapter_name="mine")
    randomise(model)
    trained = loop(model, sgd(model))
    model.disable_adapters()
    without = Figures(logits=logits_of(model))
    model.enable_adapters()
    model.save_pretrained(side.folder / "again")
    again = side.base()
    again.load_adapter(str(side.folder / "again"))
    return joined(trained, without, Figures(logits=logits_of(again)))


def from_pretrained_on_an_adapter(side: Side) -> Figures:
    adapter = _saved(side)
    with side.loading():
        model = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    return Figures(logits=logits_of(model))


def auto_peft_model(side: Side) -> Figures:
    adapter = _saved(side)
    with side.loading():
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32, is_trainable=True)
    return loop(model, sgd(model))


def peft_load_adapter(side: Side) -> Figures:
    adapter = _saved(side)
    model = side.adapted()
    randomise(model, 9)
    model.load_adapter(adapter, "reference")
    model.set_adapter("reference")
    reference = Figures(logits=logits_of(model))
    model.set_adapter("default")
    return joined(reference, loop(model, sgd(model), 4))


def adapters_of_their_own_for_each_row(side: Side) -> Figures:
    model = side.adapted()
    model.add_adapter("second", lora_config(r=2))
    randomise(model, 5, ".second.")
    model.eval()
    return Figures(logits=logits_of(model, adapter_names=["second", "__base__"]))


def a_weighted_adapter(side: Side) -> Figures:
    model = side.adapted()
    model.add_adapter("second", lora_config())
    randomise(model, 5, ".second.")
    model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="linear")
    model.set_adapter("both")
    return Figures(logits=logits_of(model))


def states_are_read_and_written(side: Side) -> Figures:
    model = side.adapted()
    saved = {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(model).items()}
    randomise(model, 8)
    set_peft_model_state_dict(model, saved)
    first = Figures(logits=logits_of(model))
    whole = {key: value.detach().cpu().clone() * 2 for key, value in model.state_dict().items() if "lora_" in key}
    model.load_state_dict(whole, strict=False)
    return joined(first, Figures(logits=logits_of(model)))


def a_deep_copy(side: Side) -> Figures:
    model = side.adapted()
    copied = copy.deepcopy(model)
    trained = loop(model, adamw(model))
    still = Figures(logits=logits_of(copied))
    copied.save_pretrained(side.folder)
    again = PeftModel.from_pretrained(side.base(), side.folder)
    return joined(trained, still, Figures(logits=logits_of(again)), loop(copied, adamw(copied)))


def averaged_weights(side: Side) -> Figures:
    model = side.adapted()
    average = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = sgd(model)
    for step in range(4):
        loop(model, optimizer, 1, first=step)
        average.update_parameters(model)
        ema.update_parameters(model)
    return joined(*(Figures(logits=logits_of(each.module)) for each in (average, ema)))


def peft_over_peft(side: Side) -> Figures:
    adapter = _saved(side)
    model = PeftModel.from_pretrained(side.base(), adapter)
    again = get_peft_model(model, lora_config())
    return loop(again, sgd(again))


def injected(side: Side) -> Figures:
    model = side.base()
    torch.manual_seed(1)
    model.requires_grad_(False)
    inject_adapter_in_model(lora_config(), model)
    randomise(model)
    return loop(model, sgd(model))


def rolled_back_but_not_the_optimizer(side: Side) -> Figures:
    """Weights as they were, moments as they are: what load_best_model_at_end and training on does."""
    model = side.adapted()
    optimizer = adamw(model)
    first = loop(model, optimizer, 4)
    saved = {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(model).items()}
    worse = loop(model, optimizer, 4, first=4)
    set_peft_model_state_dict(model, saved)
    return joined(first, worse, loop(model, optimizer, 4, first=8))


def merged_and_unmerged(side: Side) -> Figures:
    model = side.adapted()
    model.merge_adapter()
    merged = Figures(logits=logits_of(model))
    model.unmerge_adapter()
    return joined(merged, loop(model, sgd(model), 4))


def merged_for_good(side: Side) -> Figures:
    return Figures(logits=logits_of(side.adapted().merge_and_unload()))


def attention_merged_and_saved(side: Side) -> Figures:
    """The checkpoint is whole: transformers loads it."""
    model = side.adapted(target_parameters=[]).merge_and_unload()
    model.save_pretrained(side.folder / "merged")
    again = Side(side.folder / "merged", side.folder, None).base()
    return Figures(logits=logits_of(again))


def experts_merged_and_saved(side: Side) -> Figures:
    model = side.adapted().merge_and_unload()
    model.save_pretrained(side.folder / "merged")
    again = Side(side.folder / "merged", side.folder, None).base()
    return Figures(logits=logits_of(again))


def the_base_saved(side: Side) -> Figures:
    side.base().save_pretrained(side.folder / "base")
    again = Side(side.folder / "base", side.folder, None).base()
    return Figures(logits=logits_of(again))


def names_and_counts(side: Side) -> Figures:
    model = side.adapted()
    trained, whole = model.get_nb_trainable_parameters()
    shapes = [dimension for _, p in sorted(model.named_parameters()) for dimension in p.shape]
    counts = [trained, whole, model.num_parameters(), model.base_model.model.num_parameters(only_trainable=True), *shapes]
    return Figures(logits=torch.tensor([float(each) for each in counts]))


def trained_again_after_an_inference_load(side: Side) -> Figures:
    model = PeftModel.from_pretrained(side.base(), _saved(side))
    named = {name: parameter for name, parameter in model.named_parameters() if "lora" in name}
    for parameter in named.values():
        parameter.requires_grad_(True)
    return loop(model, torch.optim.AdamW(list(named.values()), lr=1e-3))


def disabled(side: Side) -> Figures:
    model = side.adapted()
    with model.disable_adapter():
        without = Figures([float(loss_of(model).detach())], (), logits_of(model))
    return joined(without, loop(model, sgd(model), 3))


def made_for_no_memory_of_this_machine(side: Side) -> Figures:
    """low_cpu_mem_usage: the matrices are first on the meta device."""
    adapter = _saved(side)
    model = PeftModel.from_pretrained(side.base(), adapter, low_cpu_mem_usage=True, is_trainable=True)
    return loop(model, sgd(model))


def summed_norms(side: Side) -> Figures:
    model = side.adapted()
    return Figures(norms=[float(p.detach().norm()) for _, p in sorted(lora_of(model).items())])


CASES = [
    Case("T2", "add_adapter, train, save, switch back", a_second_adapter, logit_bound=1e-4),
    Case("T2", "the saved second adapter", the_saved_second_adapter, logit_bound=1e-4),
    Case("T2", "two adapters active at once", two_adapters_at_once),
    Case("T2", "adapters by row of the batch", adapters_of_their_own_for_each_row,
         refused="does not support mixed adapter batches", stock_refuses=True),
    Case("T2", "add_weighted_adapter", a_weighted_adapter,
         refused="does not support targeting nn.Parameter", stock_refuses=True),
    Case("T3", "second adapter on attention alone", an_adapter_of_attention_alone),
    Case("T7", "state dicts read and written", states_are_read_and_written),
    Case("T8", "load_adapter of transformers", transformers_load_adapter),
    Case("T8", "load_adapter of transformers, trained on", transformers_load_adapter_and_train),
    Case("T8", "add_adapter of transformers", transformers_add_adapter,
         refused="version of PEFT", stock_refuses=True),
    Case("T8", "from_pretrained on an adapter's folder", from_pretrained_on_an_adapter),
    Case("T8", "AutoPeftModel", auto_peft_model),
    Case("T8", "load_adapter of PEFT", peft_load_adapter),
    Case("T8", "low_cpu_mem_usage", made_for_no_memory_of_this_machine),
    Case("T10", "save_pretrained of the base", the_base_saved),
    Case("T10", "save_pretrained of merged experts", experts_merged_and_saved),
    Case("T14", "merge_adapter and unmerge_adapter", merged_and_unmerged),
    Case("T14", "merge_and_unload", merged_for_good),
    Case("T14", "delete_adapter", a_deleted_adapter),
    Case("T15", "counts, names and shapes", names_and_counts),
    Case("T15", "norms of parameters", summed_norms),
    Case("T22", "deep copy", a_deep_copy),
    Case("T25", "weights rolled back, moments kept", rolled_back_but_not_the_optimizer),
    Case("T30", "set trainable again by name after an inference load", trained_again_after_an_inference_load),
    Case("T31", "attention merged and saved", attention_merged_and_saved),
    Case("T34", "SWA and EMA by AveragedModel", averaged_weights),
    Case("T34", "get_peft_model over a PeftModel", peft_over_peft,
         refused="target the same nn.Parameter twice", stock_refuses=True),
    Case("T34", "inject_adapter_in_model", injected),
    Case("T34", "disable_adapter", disabled),
]  # fmt: skip
