"""Recorded input -> output numbers of the reference implementations, and their parameter names in
ours.

The arrays lie in `golden.npz` of the folder $REVERIE_GOLDEN (default: tests/golden); `golden.json`
says what each is.
"""

import functools
import os
import pathlib

import numpy as np

FOLDER = pathlib.Path(os.environ.get('REVERIE_GOLDEN', pathlib.Path(__file__).parent / 'golden'))


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / 'golden.npz', allow_pickle=False) as arrays:
        return dict(arrays)


def golden(prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix`, by the rest of their names: golden('v3/kl') -> {'post_logits':
    ..., ...}.
    """
    start = prefix.rstrip('/') + '/'
    found = {k.removeprefix(start): v for k, v in _arrays().items() if k.startswith(start)}
    if not found:
        raise KeyError(f'no golden numbers under {prefix!r} in {FOLDER}')
    return found


def _mlp(flat: dict, linear: str, norm: str, layers: int, out: str | None = None) -> dict:
    """An `MLP`: `linear` and `norm` are names with a {} for the layer's number."""
    tree = dict(
        hidden={i: _leaves(flat, linear.format(i)) for i in range(layers)},
        norms={i: _leaves(flat, norm.format(i)) for i in range(layers)},
    )
    return tree if out is None else dict(tree, out=_leaves(flat, out))


def _leaves(flat: dict, name: str) -> dict:
    """The arrays right under `name`: kernel and bias, or scale."""
    found = {k.removeprefix(f'{name}/'): v for k, v in flat.items() if k.startswith(f'{name}/')}
    assert found and all('/' not in k for k in found), name
    return found


def rssm_from_v3(flat: dict[str, np.ndarray]) -> dict:
    """Our `RSSM`'s weights from V3's, whose names start with 'dyn/'."""
    dense = lambda name: dict(linear=_leaves(flat, name), norm=_leaves(flat, f'{name}norm'))
    core = dict(
        from_h=dense('dyn/dynin0'),
        from_z=dense('dyn/dynin1'),
        from_action=dense('dyn/dynin2'),
        hidden=_leaves(flat, 'dyn/dynhid0'),
        norm=_leaves(flat, 'dyn/dynhid0norm'),
        gates=_leaves(flat, 'dyn/dyngru'),
    )
    if 'dyn/obs0/kernel' not in flat:
        return dict(core=core)
    prior = _mlp(flat, 'dyn/prior{}', 'dyn/prior{}norm', 2, 'dyn/priorlogit')
    post = _mlp(flat, 'dyn/obs{}', 'dyn/obs{}norm', 1, 'dyn/obslogit')
    return dict(core=core, prior=prior, post=post)


def _convs(flat: dict, convs: list[str]) -> dict:
    return dict(
        convs={i: _leaves(flat, name) for i, name in enumerate(convs)},
        norms={i: _leaves(flat, f'{name}norm') for i, name in enumerate(convs)},
    )


def encoder_from_v3(flat: dict[str, np.ndarray]) -> dict:
    """Our `Encoder`'s weights (vectors and images) from V3's, whose names start with 'enc/'."""
    return dict(
        flat=_mlp(flat, 'enc/mlp{}', 'enc/mlp{}norm', 3),
        image=_convs(flat, [f'enc/cnn{i}' for i in range(4)]),
    )


def decoder_from_v3(flat: dict[str, np.ndarray]) -> dict:
    """Our `Decoder`'s weights (vectors and images) from V3's, whose names start with 'dec/'."""
    keys = sorted(
        k.split('/')[2] for k in flat if k.startswith('dec/vec/') and k.endswith('kernel')
    )
    image = dict(
        from_h=_leaves(flat, 'dec/sp0'),
        from_z=dict(linear=_leaves(flat, 'dec/sp1'), norm=_leaves(flat, 'dec/sp1norm')),
        from_z_out=_leaves(flat, 'dec/sp2'),
        norm=_leaves(flat, 'dec/spnorm'),
        out=_leaves(flat, 'dec/imgout'),
        **_convs(flat, ['dec/conv2', 'dec/conv1', 'dec/conv0']),
    )
    heads = {key: _leaves(flat, f'dec/vec/{key}/pred') for key in keys}
    return dict(flat=_mlp(flat, 'dec/mlp/linear{}', 'dec/mlp/norm{}', 3), heads=heads, image=image)


def head_from_v3(flat: dict[str, np.ndarray], name: str) -> dict:
    """Our `MLP`'s weights from V3's head: 'rew', 'con', 'pol', 'val' or 'slowval'.

    A continuous policy has two output layers there, mean and deviation; here they lie side by side
    in one.
    """
    layers = sum(k.startswith(f'{name}/mlp/linear') and k.endswith('kernel') for k in flat)
    outs = sorted(
        {k.rsplit('/', 1)[0] for k in flat if k.startswith(f'{name}/head/')}
    )  # mean before stddev
    out = {
        leaf: np.concatenate([flat[f'{o}/{leaf}'] for o in outs], -1) for leaf in ('kernel', 'bias')
    }
    return dict(_mlp(flat, f'{name}/mlp/linear{{}}', f'{name}/mlp/norm{{}}', layers), out=out)


def ours_from_v3(flat: dict[str, np.ndarray]) -> dict[str, dict]:
    """Weights of a whole agent, golden('v3/full_disc/params'), by module: encoder, rssm, decoder
    and four MLP heads.
    """
    return dict(
        encoder=encoder_from_v3(flat),
        rssm=rssm_from_v3(flat),
        decoder=decoder_from_v3(flat),
        reward=head_from_v3(flat, 'rew'),
        cont=head_from_v3(flat, 'con'),
        actor=head_from_v3(flat, 'pol'),
        critic=head_from_v3(flat, 'val'),
    )


def linear_from_torch(flat: dict[str, np.ndarray], name: str) -> dict:
    """Kernel, and bias if there is one, of TransDreamer's linear layer; torch keeps kernels as
    [outputs, inputs].
    """
    found = dict(kernel=flat[f'{name}.net.weight'].T)
    return found | ({'bias': flat[f'{name}.net.bias']} if f'{name}.net.bias' in flat else {})


def gate_from_torch(flat: dict[str, np.ndarray], name: str) -> dict:
    """Our `Gate`'s weights; `name` ends in a separator."""
    side = lambda which: np.concatenate(
        [flat[f'{name}{which}{gate}.net.weight'].T for gate in 'rzg'], -1
    )
    return dict(
        of_y=dict(kernel=side('W')), of_x=dict(kernel=side('U')), bias=flat[f'{name}Uz.net.bias']
    )


def layers_from_torch(flat: dict[str, np.ndarray], name: str) -> dict:
    """The layers of our `BlockCausal` from TransDreamer's transformer; `name` ends in a separator."""
    norm = lambda n: dict(scale=flat[f'{n}.layer_norm.weight'], shift=flat[f'{n}.layer_norm.bias'])
    layers = {}
    for i in range(sum(k.startswith(name) and k.endswith('q_net.net.weight') for k in flat)):
        at = f'{name}layers.{i}.'
        k, v = (linear_from_torch(flat, f'{at}mah.{x}_net')['kernel'] for x in 'kv')
        attention = dict(
            q=linear_from_torch(flat, f'{at}mah.q_net'),
            kv=dict(kernel=np.concatenate([k, v], -1)),
            o=linear_from_torch(flat, f'{at}mah.out_net'),
        )
        mlp = {
            ours: linear_from_torch(flat, f'{at}pos_ff.CoreNet.{j}')
            for ours, j in (('up', 0), ('down', 2))
        }
        layers[i] = dict(
            attention=attention, mlp=mlp, norm1=norm(f'{at}mah'), norm2=norm(f'{at}pos_ff')
        )
        if f'{at}gate1.Wr.net.weight' in flat:
            layers[i] |= dict(
                join1=gate_from_torch(flat, f'{at}gate1.'),
                join2=gate_from_torch(flat, f'{at}gate2.'),
            )
    return layers
