"""Options of PEFT's LoraConfig that a user would try in [adapter], and why each is refused or where it is written.

Words only; what [adapter] does take is in config.
"""

from collections.abc import Iterable, Mapping

WHY_REFUSED: Mapping[str, str] = {
    "r": "every client trains at its own rank: write global_rank for the adapter, [ranks] for who trains at which",
    "lora_dropout": "it belongs to training: write lora_dropout under [training]",
    "use_rslora": 'write scaling = "alpha_over_sqrt_rank" and lora_alpha: that is rsLoRA',
    "use_dora": "DoRA divides by the norm of base plus update and learns a magnitude beside it, so an update is no "
    "longer a product of factors whose rank partitions can be averaged; leave it out",
    "bias": "only LoRA's factors and modules_to_save are aggregated, and they train no bias of an adapted layer; leave "
    "it out, or name a whole module in modules_to_save",
    "rank_pattern": "a client has one rank for all its layers, because the rank partitions are the same in every "
    "layer; write [ranks] for the clients' ranks and target_modules for the layers",
    "alpha_pattern": "all layers share one scaling, by which updates of unequal rank are compared; write scaling and "
    "lora_alpha",
    "layers_to_transform": 'write the layers as patterns: target_modules = ["layers.1?.self_attn.q_proj"]',
    "layers_pattern": 'write the layers as patterns: target_modules = ["layers.1?.self_attn.q_proj"]',
    "exclude_modules": "write in target_modules what is adapted; patterns with * and ? say it shortly",
    "target_parameters": "only linear layers are adapted: a tensor of many matrices has no one pair of factors; "
    "name linear layers in target_modules",
    "init_lora_weights": "the coordinator makes the first adapter from rounds.seed, lora_A random, lora_B zero; other "
    "starts (PiSSA, OLoRA, LoftQ, ...) change the base model, which every client keeps as it is; leave it out",
}


def refusal_of(keys: Iterable[str]) -> str:
    """A sentence for each key that is such an option; empty if none is."""
    return "; ".join(f"{key}: {WHY_REFUSED[key]}" for key in keys if key in WHY_REFUSED)
