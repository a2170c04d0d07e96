"""The manifest: one digest for everything that both sides must agree on, and a founded federation keeps it."""

import json
from pathlib import Path
from typing import Any

import pytest
from coordinators import BASE_MODEL, SPEC, config_of

from common.adapter import AdapterSpec, ModuleShape
from common.codec import Layout, WireDtype
from common.errors import BaseModelMismatch, ConfigError, CorruptStore, SpecMismatch
from coordinator.federation.state import RankPolicy
from coordinator.founding import check_base_model, check_spec
from coordinator.manifest import Manifest, check_unchanged, read_spec_file, rules_of


def manifest_of(folder: Path, **changes: Any) -> Manifest:
    return Manifest.of(config_of(folder, **changes), SPEC, BASE_MODEL)


def test_a_manifest_comes_back_from_its_content(tmp_path: Path) -> None:
    manifest = manifest_of(
        tmp_path,
        ranks__policy="table",
        ranks__table=[{"client": "gpu-*", "rank": 8}],
        aggregation__weight_floor=0.25,
    )
    again = Manifest.from_content(manifest.content)
    assert (again.ranks, again.aggregation, again.training) == (manifest.ranks, manifest.aggregation, manifest.training)
    assert (again.spec, again.base_model_digest) == (manifest.spec, manifest.base_model_digest)
    assert (again.content, again.digest) == (manifest.content, manifest.digest)


def test_what_changes_no_number_changes_no_digest(tmp_path: Path) -> None:
    plain = manifest_of(tmp_path)
    elsewhere = manifest_of(
        tmp_path / "elsewhere",
        adapter__spec="spec.json",
        aggregation__processes=3,
        server__listen="127.0.0.1:1",
        store__keep_rounds=9,
        export_dir="out",
    )
    assert elsewhere.digest == plain.digest


@pytest.mark.parametrize(
    "changes",
    [{"rounds__seed": 12}, {"training__learning_rate": 0.2}, {"adapter__wire_dtype": "bfloat16"}, {"name": "letters"}],
)
def test_what_changes_a_number_changes_the_digest(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert manifest_of(tmp_path, **changes).digest != manifest_of(tmp_path).digest


def test_a_format_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    fields = json.loads(manifest_of(tmp_path).content) | {"format": 2}
    with pytest.raises(CorruptStore, match="format 2, but this version knows 1; upgrade it"):
        Manifest.from_content(json.dumps(fields).encode())


def test_a_founded_federation_may_move_but_not_change(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    check_unchanged(manifest, config_of(tmp_path, server__listen="127.0.0.1:1", aggregation__processes=2))
    check_unchanged(manifest, config_of(tmp_path, rounds__quorum=1, rounds__round_deadline_seconds=7.0))
    with pytest.raises(ConfigError, match=r"training.learning_rate: 0.2, but federation 'digits' was founded with 0.1"):
        check_unchanged(manifest, config_of(tmp_path, training__learning_rate=0.2))


@pytest.mark.parametrize(
    ("scaling", "factors"),
    [("constant", [8.0, 8.0]), ("alpha_over_rank", [4.0, 1.0]), ("alpha_over_sqrt_rank", [8 / 2**0.5, 8 / 8**0.5])],
)
def test_scaling_follows_the_rule(tmp_path: Path, scaling: str, factors: list[float]) -> None:
    manifest = manifest_of(tmp_path, adapter__scaling=scaling, adapter__lora_alpha=8.0)
    assert [manifest.scaling(2), manifest.scaling(8)] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.6, 0.2]), ("cosine", [1.0, 0.6, 0.2])],
)
def test_the_learning_rate_decays_over_the_rounds(tmp_path: Path, decay: str, rates: list[float]) -> None:
    manifest = manifest_of(
        tmp_path,
        rounds__num_rounds=3,
        training__learning_rate=1.0,
        training__decay=decay,
        training__final_fraction=0.2,
    )
    assert [manifest.learning_rate(number) for number in (1, 2, 3)] == pytest.approx(rates)


def test_a_single_round_trains_at_the_full_rate(tmp_path: Path) -> None:
    assert manifest_of(tmp_path, rounds__num_rounds=1).learning_rate(1) == pytest.approx(0.1)


def test_every_client_and_round_has_a_seed_of_its_own_that_any_generator_accepts(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    seeds = [manifest.plan(number, client).seed for number in (1, 2) for client in ("ada", "bob")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    assert manifest.plan(1, "ada").seed == seeds[0]


@pytest.mark.parametrize(("method", "freezes"), [("raflora", False), ("ffa-lora", True)])
def test_a_method_that_freezes_lora_A_says_so_in_every_plan(tmp_path: Path, method: str, freezes: bool) -> None:
    manifest = manifest_of(tmp_path, aggregation__method=method)
    assert (manifest.freezes_lora_A, manifest.plan(1, "ada").freezes_lora_A) == (freezes, freezes)


def test_the_layout_is_that_of_the_wire(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, adapter__wire_dtype="bfloat16")
    assert manifest.layout(3) == Layout(SPEC, 3, WireDtype.BFLOAT16)


def test_the_rules_are_the_state_machine_s_part(tmp_path: Path) -> None:
    changes = {"ranks__policy": "cycle", "ranks__levels": [2, 4], "rounds__quorum": 2}
    manifest = manifest_of(tmp_path, **changes)
    rules = manifest.rules
    assert rules == rules_of(config_of(tmp_path, **changes)), "a plan goes by the rules of the federation to come"
    assert (rules.num_rounds, rules.global_rank, rules.min_clients, rules.quorum) == (2, 8, 3, 2)
    assert (rules.rank_policy, rules.rank_levels) == (RankPolicy.CYCLE, (2, 4))


# ---------------------------------------------------------------- what must match


def test_a_worker_with_other_layers_is_told_which(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    check_spec(manifest, AdapterSpec(SPEC.modules[::-1], SPEC.tensors[::-1]), "ada")
    with pytest.raises(SpecMismatch, match=r"ada: .* missing \['encoder.1.dense'\], unexpected none"):
        check_spec(manifest, AdapterSpec(SPEC.modules[:1], SPEC.tensors), "ada")
    other = (ModuleShape("encoder.0.query", 16, 13), SPEC.modules[1])
    with pytest.raises(SpecMismatch, match=r"in_features=13.*expected .*in_features=12"):
        check_spec(manifest, AdapterSpec(other, SPEC.tensors), "ada")


def test_an_unset_base_model_accepts_any_and_a_set_one_only_itself() -> None:
    check_base_model("", BASE_MODEL, "ada")
    check_base_model(BASE_MODEL, BASE_MODEL, "ada")
    with pytest.raises(BaseModelMismatch, match=f"ada: base model abc, but this federation trains {BASE_MODEL[:12]}"):
        check_base_model(BASE_MODEL, "abc", "ada")


def test_a_spec_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    content = {
        "base_model_digest": BASE_MODEL,
        "modules": [
            {"name": m.name, "out_features": m.out_features, "in_features": m.in_features} for m in SPEC.modules
        ],
        "tensors": [{"name": t.name, "shape": list(t.shape)} for t in SPEC.tensors],
    }
    file.write_text(json.dumps(content))
    assert read_spec_file(file) == (SPEC, BASE_MODEL)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"modules": 3}', '{"modules": [{}], "tensors": []}'])
def test_another_file_is_no_spec_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "spec.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"adapter.spec: .*spec.json is not what `raflora spec` writes"):
        read_spec_file(file)
