"""Which scores may be compared, and the self-check against published ones."""

import pytest

from lit_jax.evaluation import protocol


def result_of(**fields):
    made_by = {"features": "inception_adm", "samples": {"cfg_scale": 1.5}} | fields
    return {"scores": {"fid_adm_50k": 2.0}, "protocol": made_by}


def test_unequal_protocols_refuse_to_be_compared():
    protocol.check_comparable({"a": result_of(), "b": result_of()})
    message = "a and b were not made by the same protocol: weights is None and 'x'"
    with pytest.raises(ValueError, match=message):
        protocol.check_comparable({"a": result_of(), "b": result_of(weights="x")})

    scales = {"a": result_of(), "b": result_of(samples={"cfg_scale": 4.0, "sampler": "ddim"})}
    message = r"^compare_across = \('samples.cfg_scale',\): .*samples.sampler is None and 'ddim'"
    with pytest.raises(ValueError, match=message):
        protocol.check_comparable(scales, ("samples.cfg_scale",))
    protocol.check_comparable(scales, ("samples",))

    fewer = result_of() | {"scores": {"fid_adm_10k": 2.0}}
    with pytest.raises(ValueError, match="different scores"):
        protocol.check_comparable({"a": result_of(), "b": fewer})


def test_a_branch_that_may_differ_is_no_prefix_of_a_name():
    """ "samples" allows samples.seed to differ, and not samples_of."""
    protocol.check_comparable(
        {"a": result_of(), "b": result_of(samples={"seed": 1, "cfg_scale": 1.5})}, ("samples",)
    )
    with pytest.raises(ValueError, match="samples_of is None and 1"):
        protocol.check_comparable({"a": result_of(), "b": result_of(samples_of=1)}, ("samples",))


def test_self_check_passes_at_the_published_figures_and_fails_next_to_them():
    published = {name: value for name, (value, _) in protocol.PUBLISHED.items()}
    assert all(row["passed"] for row in protocol.self_check(published))
    off = published | {"fid_adm_50k": 3.97}  # what a half-pixel resize costs is larger than this
    failed = [row["score"] for row in protocol.self_check(off) if not row["passed"]]
    assert failed == ["fid_adm_50k"]
    del published["sfid_adm_50k"]
    with pytest.raises(ValueError, match="needs .'sfid_adm_50k'."):
        protocol.self_check(published)
