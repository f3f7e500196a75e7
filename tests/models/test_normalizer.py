"""The normaliser against scikit-learn, fp64 and its own promises."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from blip3o_fast.models.normalizer import (
    FILE_NAME,
    FeatureNormalizers,
    Normalizer,
    condition_spec,
    parse_spec,
)

CHANNELS = 12


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    scale = torch.logspace(-0.5, 1, CHANNELS)
    x = torch.randn(40, 9, CHANNELS, generator=generator) @ mixing * scale + 5.0
    return x.float()


def close(found: torch.Tensor, wanted: torch.Tensor | np.ndarray, tolerance: float) -> bool:
    wanted = torch.as_tensor(wanted).double()
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    return bool(error <= tolerance)  # NaN fails


def test_standardize_is_scikit_learns(features: torch.Tensor) -> None:
    rows = features.reshape(-1, CHANNELS).double().numpy()
    wanted = StandardScaler().fit_transform(rows).reshape(features.shape)
    n = Normalizer.fit(features, "standardize")
    assert n.in_features == n.out_features == CHANNELS
    assert n.explained_variance == 1.0
    assert close(n(features), wanted, 1e-5)
    assert close(n.inverse(n(features)), features, 1e-6)


@pytest.mark.parametrize("count", [1, 5, CHANNELS])
def test_pca_is_scikit_learns_up_to_sign(features: torch.Tensor, count: int) -> None:
    rows = features.reshape(-1, CHANNELS).double().numpy()
    oracle = PCA(n_components=count, svd_solver="full").fit(rows)
    n = Normalizer.fit(features, f"pca:{count}")
    assert n.out_features == count
    y = n(features).reshape(-1, count)
    # scikit-learn whitens with N - 1, and its signs are its own
    projected = torch.from_numpy(oracle.transform(rows))
    projected = projected / projected.std(dim=0, unbiased=False)
    signs = (projected * y.double()).sum(dim=0).sign()
    assert close(y, projected * signs, 2e-3)
    assert abs(n.explained_variance - oracle.explained_variance_ratio_.sum()) <= 1e-5
    restored = oracle.inverse_transform(oracle.transform(rows)).reshape(features.shape)
    assert close(n.inverse(n(features)), restored, 1e-4)


def test_pca_output_is_white_and_the_basis_sign_is_fixed(features: torch.Tensor) -> None:
    n = Normalizer.fit(features, "pca:4")
    y = n(features).reshape(-1, 4).double()
    covariance = y.T @ y / y.shape[0]
    assert close(covariance, torch.eye(4), 2e-3)
    basis = n.statistics["basis"]
    assert bool((basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all())
    flipped = Normalizer.fit(features.flip(0), "pca:4")
    assert close(flipped.statistics["basis"], basis, 1e-4)


def test_pca_of_fp64_features_is_fp64_accurate(features: torch.Tensor) -> None:
    x = features.double()
    n = Normalizer.fit(x, "pca:3")
    assert n(x).dtype == torch.float64
    assert abs(float(n(x).reshape(-1, 3).var(dim=0, unbiased=False).mean()) - 1.0) <= 1e-6


def test_l2_is_the_original_scripts(features: torch.Tensor) -> None:
    x = features.clone()
    x[0, 0] = 0.0  # an empty token must give zeros, not NaN
    n = Normalizer.fit(x, "l2")
    assert close(n(x), torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8), 1e-6)
    length = x.double().norm(dim=-1).mean()
    assert close(n.inverse(n(x)).double().norm(dim=-1)[1:], length.expand(39, 9), 1e-5)
    cosine = torch.nn.functional.cosine_similarity(n.inverse(n(x))[1:], x[1:], dim=-1)
    assert bool((cosine >= 1 - 1e-5).all())


def test_none_changes_nothing(features: torch.Tensor) -> None:
    n = Normalizer.fit(features, "none")
    assert torch.equal(n(features), features)
    assert torch.equal(n.inverse(features), features)


def test_constant_channels_are_centred_not_blown_up(features: torch.Tensor) -> None:
    x = features.clone()
    x[..., 3] = 1234.5
    n = Normalizer.fit(x, "standardize")
    assert bool((n(x)[..., 3].abs() <= 1e-3).all())
    assert close(n.inverse(n(x)), x, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_arithmetic_is_fp32(features: torch.Tensor, dtype: torch.dtype) -> None:
    n = Normalizer.fit(features, "standardize")
    x = features.to(dtype)
    assert n(x).dtype == dtype
    assert n.inverse(n(x)).dtype == dtype
    assert torch.equal(n(x), n(x.double() if dtype == torch.float64 else x.float()).to(dtype))


def test_autocast_does_not_round_the_projection(features: torch.Tensor) -> None:
    n = Normalizer.fit(features, "pca:3")
    y = n(features)
    x = n.inverse(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(n(features), y)
        assert torch.equal(n.inverse(y), x)


def test_gradients_flow(features: torch.Tensor) -> None:
    for spec in ("none", "standardize", "l2", "pca:3"):
        n = Normalizer.fit(features, spec)
        x = features[:1, :2].double().requires_grad_()
        assert torch.autograd.gradcheck(n, x, atol=1e-6)
        y = n(x).detach().requires_grad_()
        assert torch.autograd.gradcheck(n.inverse, y, atol=1e-6)


def test_fit_does_not_depend_on_the_leading_shape(features: torch.Tensor) -> None:
    for spec in ("standardize", "l2", "pca:3"):
        a = Normalizer.fit(features, spec)
        b = Normalizer.fit(features.reshape(-1, CHANNELS), spec)
        assert all(torch.equal(a.statistics[k], b.statistics[k]) for k in a.statistics)


@pytest.mark.parametrize("spec", ["none", "standardize", "l2", "pca:5"])
def test_save_and_load_are_inverse(tmp_path, features: torch.Tensor, spec: str) -> None:
    pair = FeatureNormalizers.fit(features[..., :7], features, spec)
    assert pair.condition.spec == condition_spec(spec)
    path = pair.save(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == [path.name] == [FILE_NAME]
    back = FeatureNormalizers.load(tmp_path / "new")
    assert torch.equal(back.condition(features[..., :7]), pair.condition(features[..., :7]))
    y = pair.target(features)
    assert torch.equal(back.target(features), y)
    assert torch.equal(back.target.inverse(y), pair.target.inverse(y))
    assert (back.target.spec, back.target.in_features) == (spec, CHANNELS)
    assert back.target.explained_variance == pair.target.explained_variance


def test_condition_spec() -> None:
    assert [condition_spec(s) for s in ("none", "standardize", "l2", "pca:8")] == [
        "none",
        "standardize",
        "l2",
        "standardize",
    ]


@pytest.mark.parametrize("spec", ["", "pca", "pca:", "pca:0", "pca:-1", "pca:1.5", "pca:٣", "L2", None, 3, "zscore"])
def test_unknown_specs_are_refused(features: torch.Tensor, spec) -> None:
    with pytest.raises(ValueError, match=r"normalize: got .* allowed are 'none', 'standardize'"):
        parse_spec(spec)
    with pytest.raises(ValueError, match="allowed are"):
        Normalizer.fit(features, spec)


def test_bad_features_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"13 components .* only 12 channels; K must be 1..12"):
        Normalizer.fit(features, "pca:13")
    with pytest.raises(ValueError, match=r"vary in only 2 directions; K must be 1..2"):
        Normalizer.fit(features.reshape(-1, CHANNELS)[:3], "pca:4")
    with pytest.raises(ValueError, match="vary in only 0 directions"):
        Normalizer.fit(torch.ones(4, 4, 3), "pca:1")
    with pytest.raises(ValueError, match="floating point tensor"):
        Normalizer.fit(torch.ones(4, 4, 3, dtype=torch.int64), "standardize")
    with pytest.raises(ValueError, match=r"got shape \(0, 9, 12\)"):
        Normalizer.fit(features[:0], "standardize")
    features[3, 3, 3] = float("nan")
    for spec in ("standardize", "l2", "pca:2"):
        with pytest.raises(ValueError, match="not finite"):
            Normalizer.fit(features, spec)


def test_wrong_widths_are_refused(features: torch.Tensor) -> None:
    n = Normalizer.fit(features, "pca:4")
    with pytest.raises(ValueError, match=r"x: got shape .* last dimension must be 12"):
        n(features[..., :4])
    with pytest.raises(ValueError, match=r"y: got shape .* last dimension must be 4"):
        n.inverse(features)
    with pytest.raises(ValueError, match="x: got dtype torch.int64"):
        n(features.long())


def test_damaged_files_are_refused_by_name(tmp_path, features: torch.Tensor) -> None:
    with pytest.raises(FileNotFoundError, match="no stored normalisation"):
        FeatureNormalizers.load(tmp_path)
    path = FeatureNormalizers.fit(features, features, "pca:4").save(tmp_path)
    whole = path.read_bytes()
    good = {name: value.clone() for name, value in load_file(path).items()}  # not the mapped file
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            FeatureNormalizers.load(tmp_path)
        assert FILE_NAME in str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused("not a whole safetensors file")
    save_file(good, path, metadata={**header, "format_version": "9"})
    refused("format_version '9'")
    save_file({**good, "target.extra": torch.ones(1)}, path, metadata=header)
    refused("'pca' needs exactly")
    save_file({**good, "target.std": torch.ones(3)}, path, metadata=header)
    refused(r"'std' is torch.float32 \(3,\); float32 \(4,\)")
    save_file({**good, "target.std": -torch.ones(4)}, path, metadata=header)
    refused("'std' has values <= 0")
    save_file({**good, "target.mean": torch.full((12,), torch.inf)}, path, metadata=header)
    refused("'mean' has NaN or Inf")
    save_file(good, path, metadata={**header, "target": '{"spec": "magic", "in_features": 12}'})
    refused("got 'magic'; allowed are")
    save_file(good, path, metadata={"format_version": "1", "target": header["target"]})
    refused("bad 'condition' normaliser")
