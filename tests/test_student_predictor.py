"""The predictor in its three styles, against formulas written out in numpy (numpy_predictor.py)."""

import numpy as np
import pytest
import torch
from numpy_predictor import predict, sincos

from student import ConfigError, PredictorConfig
from student.batch import Mask
from student.modules.predictor import Predictor

GRID = (2, 3)
MASK = Mask(keep=torch.tensor([[4, 0, 1], [5, 2, 0]]), drop=torch.tensor([[2, 5, 3], [1, 3, 4]]))
STYLES = {
    "mae": PredictorConfig("self", dim=8, depth=2, heads=2),
    "milan": PredictorConfig("prompting", dim=8, depth=2, heads=4),
    "cae-v2": PredictorConfig("regressor", dim=12, depth=2, heads=3, layer_scale=0.1),  # as wide as the encoder
    "cae-v2-ti": PredictorConfig("regressor", dim=8, depth=1, heads=2, layer_scale=0.1),  # narrower: with a bridge
}
ENCODER_DIM = 12


def random_predictor(config: PredictorConfig, encoder_dim: int = ENCODER_DIM, grid=GRID) -> Predictor:
    """A predictor none of whose parameters is at a special value."""
    torch.manual_seed(0)
    predictor = Predictor(config, encoder_dim, grid)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return predictor


def random_tokens(n_tokens: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, n_tokens, ENCODER_DIM, generator=torch.Generator().manual_seed(seed))


def by_hand(predictor: Predictor, config: PredictorConfig, tokens: torch.Tensor, mask: Mask = MASK, **changes) -> np.ndarray:
    weights = {name: parameter.detach().numpy().astype(np.float64) for name, parameter in predictor.named_parameters()}
    options = {"style": config.style, "depth": config.depth, "n_heads": config.heads, "grid": GRID}
    return predict(weights, tokens.double().numpy(), mask.keep.numpy(), mask.drop.numpy(), **{**options, **changes})


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no cls"])
def test_by_hand(config, has_cls):
    """With given weights and a given mask, every style is its formula, with CLS and without."""
    predictor, tokens = random_predictor(config), random_tokens(3 + has_cls)
    got = predictor(tokens, MASK)
    assert got.shape == (2, has_cls + 6, config.dim)
    np.testing.assert_allclose(got.detach().numpy(), by_hand(predictor, config, tokens, has_cls=has_cls), atol=1e-5)


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_order_of_visible_patches_does_not_matter(config):
    """Patches come out row by row, in whatever order the encoder had them."""
    predictor, tokens = random_predictor(config), random_tokens()
    shuffled = torch.tensor([2, 0, 1])
    other = Mask(MASK.keep[:, shuffled], MASK.drop.flip(1))
    expected = predictor(torch.cat([tokens[:, :1], tokens[:, 1:][:, shuffled]], dim=1), other)
    torch.testing.assert_close(predictor(tokens, MASK), expected, atol=1e-5, rtol=1e-4)


def names(predictor: Predictor) -> set[str]:
    return {name.removeprefix("blocks.0.") for name, _ in predictor.named_parameters() if not name.startswith("blocks.1.")}


def pairs(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def test_parameter_names():
    """Names are those of the public code, or what the docstrings map them to; positions are not saved."""
    ends = {"mask_token"} | pairs("norm")
    block = pairs("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert names(random_predictor(STYLES["mae"])) == ends | pairs("embed", "attn.qkv") | block
    assert names(random_predictor(STYLES["milan"])) == ends | pairs("embed", "attn.q", "attn.kv") | block
    block = block - pairs("norm1") | pairs("norm1_q", "norm1_k", "norm1_v", "attn.q", "attn.v")
    block |= {"attn.k.weight", "ls1.gamma", "ls2.gamma"}
    assert names(random_predictor(STYLES["cae-v2"])) == ends | block
    assert names(random_predictor(STYLES["cae-v2-ti"])) == ends | block | pairs("embed", "embed_norm")
    for config in STYLES.values():
        predictor = random_predictor(config)
        assert set(predictor.state_dict()) == {name for name, _ in predictor.named_parameters()}


PRE_NORM_BLOCK = (12, 13)  # of width D: 12 D^2 + 13 D parameters, in MAE and in MILAN
REGRESSOR_BLOCK = (12, 18)  # no bias of k, two norms and two scales more


@pytest.mark.parametrize(
    "encoder_dim, config, block, bridge",
    [
        (384, PredictorConfig(), PRE_NORM_BLOCK, 384 * 512 + 512),
        (768, PredictorConfig(), PRE_NORM_BLOCK, 768 * 512 + 512),
        (768, PredictorConfig("prompting"), PRE_NORM_BLOCK, 768 * 512 + 512),
        (1024, PredictorConfig("prompting"), PRE_NORM_BLOCK, 1024 * 512 + 512),
        (192, PredictorConfig("regressor", 96, 1, 12, layer_scale=0.1), REGRESSOR_BLOCK, 192 * 96 + 96 + 2 * 96),
        (384, PredictorConfig("regressor", 384, 1, 12, layer_scale=0.1), REGRESSOR_BLOCK, 0),
        (768, PredictorConfig("regressor", 768, 4, 12, layer_scale=0.1), REGRESSOR_BLOCK, 0),
        (1024, PredictorConfig("regressor", 1024, 4, 16, layer_scale=0.1), REGRESSOR_BLOCK, 0),
    ],
    ids=["mae-s", "mae-b", "milan-b", "milan-l", "cae-v2-ti", "cae-v2-s", "cae-v2-b", "cae-v2-l"],
)
def test_parameter_counts(encoder_dim, config, block, bridge):
    """Blocks, the way in, the mask token and the last norm: nothing else, in the papers' sizes."""
    with torch.device("meta"):
        predictor = Predictor(config, encoder_dim, (14, 14))
    squares, lines = block
    expected = config.depth * (squares * config.dim**2 + lines * config.dim) + bridge + 3 * config.dim
    assert sum(parameter.numel() for parameter in predictor.parameters()) == expected


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_depth_0(config):
    """Without blocks, tokens are normed at their places and hidden ones are the mask token, with MAE's positions or none."""
    config = PredictorConfig(config.style, config.dim, 0, config.heads)
    predictor, tokens = random_predictor(config), random_tokens()
    got = predictor(tokens, MASK).detach().numpy()
    np.testing.assert_allclose(got, by_hand(predictor, config, tokens), atol=1e-5)
    hidden = got[0, 1 + MASK.drop[0].numpy()]
    assert (hidden[0] == hidden[1]).all() == (config.style == "regressor")


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_nothing_hidden(config):
    """A mask that hides no patch is no error."""
    everything = Mask(torch.tensor([[3, 1, 0, 2, 5, 4]] * 2), torch.empty(2, 0, dtype=torch.long))
    predictor, tokens = random_predictor(config), random_tokens(7)
    np.testing.assert_allclose(
        predictor(tokens, everything).detach().numpy(), by_hand(predictor, config, tokens, everything), atol=1e-5
    )


@pytest.mark.parametrize("name", ["milan", "cae-v2"])
def test_visible_tokens_are_not_updated(name):
    """Prompts enter every block as the first one got them, come out as without blocks, and CLS is a prompt for MILAN alone."""
    config = STYLES[name]
    predictor, tokens = random_predictor(config), random_tokens()
    seen = []
    for block in predictor.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    got = predictor(tokens, MASK)

    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert seen[0].shape[1] == (4 if name == "milan" else 3)
    shallow = by_hand(predictor, config, tokens, depth=0)
    for image in range(2):
        places = np.concatenate([[0], 1 + MASK.keep[image].numpy()])
        np.testing.assert_allclose(got[image].detach().numpy()[places], shallow[image, places], atol=1e-5)


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_gradient_reaches_visible_tokens(config):
    """What is said of hidden patches teaches the encoder at visible ones, and at CLS unless the regressor leaves it out."""
    predictor, tokens = random_predictor(config), random_tokens().requires_grad_()
    out = predictor(tokens, MASK)
    out[0, 1 + MASK.drop[0]].pow(3).sum().backward()
    norms = tokens.grad.norm(dim=-1)
    assert (norms[0, 1:] > 1e-6).all() and (norms[1] == 0).all()
    assert (norms[0, 0] == 0) == (config.style == "regressor")


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_every_parameter_gets_a_gradient(config):
    """Nothing is left over that a distributed run would wait for."""
    predictor = random_predictor(config)
    predictor(random_tokens(), MASK).pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_initial_weights():
    """Linear xavier-uniform over each matrix as the code has it, bias 0; norms 1 and 0; LayerScale .1; mask token std .02."""
    torch.manual_seed(0)
    for config in (
        PredictorConfig("self", 64, 1, 4),
        PredictorConfig("prompting", 64, 1, 4),
        PredictorConfig("regressor", 64, 1, 4, layer_scale=0.1),
    ):
        predictor = Predictor(config, 128, GRID)
        parameters = dict(predictor.named_parameters())
        for name, value in parameters.items():
            if value.ndim == 2:
                bound = (6 / sum(value.shape)) ** 0.5
                assert value.abs().max() <= bound and value.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
            elif name.endswith("bias"):
                assert (value == 0).all(), name
            elif "norm" in name:
                assert (value == 1).all(), name
            elif "gamma" in name:
                assert value.eq(0.1).all(), name
    assert parameters["mask_token"].abs().max() <= 0.02  # cut at one deviation (CAE)

    tokens = torch.stack([Predictor(PredictorConfig("prompting", 64, 0, 4), 8, GRID).mask_token for _ in range(50)]).detach()
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05) and tokens.abs().max() > 0.05


def test_position_conventions():
    """MAE and MILAN have columns in the first half of the channels, CAE has rows there."""
    for config in STYLES.values():
        expected = sincos(config.dim, *GRID, columns_first=config.style != "regressor")
        np.testing.assert_allclose(random_predictor(config).positions.numpy(), expected, atol=1e-6)


def test_drop_path():
    """Branches are dropped more often from block to block, never in the first, and not at all in evaluation."""
    config = PredictorConfig("regressor", 8, 3, 2, layer_scale=0.1, drop_path=0.5)
    predictor = random_predictor(config)
    assert [block.drop_path1.drop_prob for block in predictor.blocks] == [0, 0.25, 0.5]
    assert Predictor(PredictorConfig("regressor", 8, 1, 2, drop_path=0.5), 8, GRID).blocks[0].drop_path1.drop_prob == 0

    tokens = random_tokens()
    torch.manual_seed(0)
    assert len({predictor(tokens, MASK).sum().item() for _ in range(10)}) > 1
    predictor.eval()
    np.testing.assert_allclose(predictor(tokens, MASK).detach().numpy(), by_hand(predictor, config, tokens), atol=1e-5)


def test_public_names_of_cae_load_strictly():
    """A CAE v2 checkpoint, renamed as the docstrings say, is a complete one."""
    predictor = random_predictor(STYLES["cae-v2-ti"])
    block = "regresser.regressor_blocks.0."
    renamed = {"encoder_to_regresser": "embed", "encoder_to_regresser_norm": "embed_norm", "decoder.norm": "norm"}
    inside = {"norm1_q": "norm1_q", "norm1_k": "norm1_k", "norm1_v": "norm1_v", "norm2_cross": "norm2"}
    inside |= {"cross_attn.proj": "attn.proj", "mlp_cross.fc1": "mlp.fc1", "mlp_cross.fc2": "mlp.fc2"}
    renamed |= {block + old: "blocks.0." + new for old, new in inside.items()}
    single = {"mask_token": "mask_token"}
    single |= {f"{block}cross_attn.{part}.weight": f"blocks.0.attn.{part}.weight" for part in "qkv"}
    single |= {f"{block}cross_attn.{part}_bias": f"blocks.0.attn.{part}.bias" for part in "qv"}
    single |= {f"{block}gamma_{number}_cross": f"blocks.0.ls{number}.gamma" for number in (1, 2)}
    single |= {f"{old}.{kind}": f"{new}.{kind}" for old, new in renamed.items() for kind in ("weight", "bias")}

    state = predictor.state_dict()
    public = {old: state[new] for old, new in single.items()}
    predictor.load_state_dict({single[old]: value for old, value in public.items()}, strict=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_scale": 0.0}, "layer_scale must be positive"),
        ({"heads": 3}, "no multiple of heads=3"),
        ({"dim": 6, "heads": 2}, "multiple of 4 for the position table"),
    ],
)
def test_wrong_values(change, words):
    """Sizes that cannot be built are refused when the config is."""
    with pytest.raises(ConfigError, match=words):
        PredictorConfig(**{"dim": 8, "heads": 2, **change})
