"""Experiments as people have them: recordings without a game, runs that were stopped, moved, or
asked for more; seeds of environments on the host.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.commands.experiment import Recorded, load, played
from reverie.commands.play.setup import open_session, resolve_play
from reverie.data import Episodes, Writer
from reverie.envs import device
from reverie.evaluation.game import DeviceGame, HostGame
from reverie.training import checkpoint, metrics
from reverie.types import ActionSpace, EnvSpec, Step, UserError

pytestmark = pytest.mark.whole

SPEC = EnvSpec('mygame', (20, 20, 3), ActionSpace('discrete', 4))


def write(path, dtype=np.uint8, spec=SPEC, episodes=6, rewards=True):
    rng = np.random.default_rng(0)
    with Writer(path, spec) as writer:
        for _ in range(episodes):
            t = 30
            first, last = np.arange(t) == 0, np.arange(t) == t - 1
            obs = rng.integers(100, 140, (t, *spec.obs_shape)).astype(dtype)
            action = np.where(first, -1, rng.integers(0, spec.actions.size, t))
            reward = (rng.random(t) < 0.2).astype(np.float32) * ~first
            step = Step(obs, action, reward, first, last, last)
            writer.add('people', step, has_reward=rewards)
    return path


class Stop(Exception):
    pass


class StopAt:
    """A sink that stops the run at the second record of a phase, after its first checkpoint."""

    def __init__(self, phase):
        self.phase = phase

    def write(self, record):
        if (record['phase'], record['step']) == (self.phase, 4):
            raise Stop

    def close(self):
        pass


@pytest.fixture(scope='module')
def recordings(tmp_path_factory):
    return write(tmp_path_factory.mktemp('recordings') / 'mine')


@pytest.fixture(scope='module')
def run(recordings, tmp_path_factory):
    """Dreamer 4 on recordings of a game that nobody can make."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    config = registry.get('dreamer4_debug')
    experiment = Recorded('dreamer4_debug', config, 'mygame', data=(recordings,))
    params = experiment.train(folder, updates_per_call=4)
    record = experiment.evaluate(folder, params, 2, 10, say=[].append)
    assert 'random' not in record['score'] and 'imagination' not in record['score']
    experiment.report(folder, params)
    return folder


def test_recordings_train_without_their_game_and_say_why_nothing_is_scored(run, recordings):
    experiment, params = load(run)
    assert experiment.game is None and "environment 'mygame' is unknown" in experiment.unscored
    assert experiment.spec == Episodes(recordings).spec
    with pytest.raises(UserError, match='no scores can be taken'):
        readout = experiment.agent.readouts['imagination']
        key = jax.random.key(0)
        experiment.score(readout.actor, params, key, episodes=1, max_steps=1, greedy=False)
    assert 'This run has no scores' in (run / 'report.html').read_text()


def test_pixels_are_standardised_by_the_dataset_and_reports_show_pictures(run, recordings):
    pixels = np.concatenate([r.obs for r in Episodes(recordings).records()]) / 255
    tokenizer = json.loads((run / 'config.json').read_text())['config']['tokenizer']
    assert tokenizer['pixel_mean'] == pytest.approx(pixels.mean(), abs=1e-3)
    assert tokenizer['pixel_std'] == pytest.approx(pixels.std(), abs=1e-3)
    with np.load(run / 'samples.npz') as samples:
        for name in ('recon/truth', 'recon/output', 'dream/truth', 'dream/dream'):
            assert samples[name].min() >= 0 and samples[name].max() <= 1, name
        truth, output = samples['recon/truth'], samples['recon/output'][0]
    assert truth.min() > 0.38 and truth.max() < 0.56
    # Noise cannot be compressed; the mean picture can be found.
    assert np.mean((output - truth) ** 2) < 4 * truth.var()


def test_a_moved_run_opens_without_its_dataset_and_plays_with_it_beside(run, recordings, tmp_path):
    moved = tmp_path / 'moved' / 'run'
    shutil.copytree(run, moved)
    saved = json.loads((moved / 'config.json').read_text())
    assert saved['data'] == str(recordings.absolute())
    (moved / 'config.json').write_text(json.dumps(saved | {'data': str(tmp_path / 'gone')}))
    experiment, _ = load(moved)
    assert not experiment.has_data and experiment.spec.obs_shape == (20, 20, 3)
    assert experiment.frames == Episodes(recordings).frames
    with pytest.raises(UserError, match='--data says where'):
        experiment.train(moved)
    with pytest.raises(UserError, match='neither its environment nor its recordings'):
        open_session(resolve_play(str(moved), None, {}, 0), 1, 0)
    shutil.copytree(recordings, moved.parent / 'gone')
    again, _ = load(moved)
    assert again.has_data and again.data == (moved.parent / 'gone',)
    elsewhere, _ = load(moved, (recordings,))
    assert elsewhere.data == (recordings,)


def test_a_dataset_of_another_shape_than_its_game_is_refused(tmp_path):
    spec = EnvSpec('minatar/breakout', (10, 10, 3), ActionSpace('discrete', 6))
    data = write(tmp_path / 'odd', np.uint8, spec)
    with pytest.raises(UserError, match=r'observation shape \[10, 10, 3\], expected \[10, 10, 4\]'):
        Recorded('dreamer4_debug', registry.get('dreamer4_debug'), 'minatar/breakout', data=(data,))


@pytest.fixture(scope='module')
def stopped_run(tmp_path_factory):
    """Dreamer 4 on Breakout, stopped in the middle of imagination; ends of phases are kept."""
    folder = tmp_path_factory.mktemp('stopped')
    spec = EnvSpec('minatar/breakout', (10, 10, 4), ActionSpace('discrete', 6))
    data = write(folder / 'data', bool, spec)
    config = registry.get('dreamer4_debug')
    experiment = Recorded('dreamer4_debug', config, 'minatar/breakout', data=(data,))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(metrics, 'Terminal', lambda phases: StopAt('imagine'))
        how = dict(updates_per_call=2, checkpoint_every_s=0.0, log_every_s=0.0)
        experiment.train(folder / 'run', **how)
    return folder / 'run'


@pytest.mark.parametrize(
    'phase, readouts',
    [('dynamics', set()), ('finetune', {'wm_bc'}), ('imagine', {'imagination', 'wm_bc'})],
)
def test_a_stopped_run_is_scored_with_what_has_been_learnt(tmp_path, stopped_run, phase, readouts):
    """A prior that imagination has not begun from yet is the policy so far."""
    folder = shutil.copytree(stopped_run, tmp_path / 'run')
    for step in reversed(checkpoint.steps(folder / 'checkpoints')):
        if json.loads((step / 'meta.json').read_text())['phase'] == phase:
            break
        checkpoint.remove(step)
    stopped, params = load(folder)
    assert set(stopped.readouts) == readouts
    said: list[str] = []
    if not readouts:
        with pytest.raises(UserError, match='before it has a policy'):
            stopped.evaluate(folder, params, 2, 10, say=said.append)
        return
    record = stopped.evaluate(folder, params, 2, 10, say=said.append)
    assert set(record['score']) >= readouts | {'random'}
    assert record['stopped'].startswith(f'{phase} at step') and phase in record['gradient_steps']
    assert any('scored as it is' in line for line in said)
    if phase == 'finetune':
        jax.tree.map(np.testing.assert_array_equal, params['prior'], params['policy'])
    stopped.report(folder, params)


@pytest.mark.parametrize('seed', [0, 1, 2**32 - 1])
def test_no_two_purposes_see_the_same_episodes_on_the_host(seed):
    pytest.importorskip('gymnasium')
    cart = HostGame('gym/CartPole-v1', {})
    begun = []
    for purpose in ('train', 'score', 'report', 'play', 'collect'):
        for number in {seed, 7}:
            with cart.vector(2, purpose, number) as vector:
                begun.append(vector.reset().obs)
    assert len(np.unique(np.concatenate(begun), axis=0)) == sum(map(len, begun))


def test_the_seed_of_an_evaluation_chooses_the_episodes_on_the_host():
    pytest.importorskip('gymnasium')
    experiment = played('gym/CartPole-v1')(
        'dreamer_v3_debug', registry.get('dreamer_v3_debug'), 'gym/CartPole-v1'
    )
    from reverie.evaluation.returns import RandomActor

    random = RandomActor(experiment.spec.actions)

    def lengths(seed):
        how = dict(episodes=4, max_steps=60, greedy=False)
        key = jax.random.key(seed)
        return experiment.score(random, {'none': np.zeros(1)}, key, **how).lengths.tolist()

    assert lengths(1) == lengths(1) != lengths(2)


@dataclasses.dataclass(frozen=True)
class Bright:
    """A game of one picture, of numbers that its dtype does not tell the scale of."""

    top: float

    @property
    def spec(self):
        return EnvSpec('bright', (4, 4, 1), ActionSpace('discrete', 2))

    def reset(self, key):
        no, yes = jnp.asarray(False), jnp.asarray(True)
        return (), Step(jnp.zeros((4, 4, 1)), jnp.zeros(2), jnp.zeros(()), yes, no, no)

    def step(self, state, action, key):
        no = jnp.asarray(False)
        obs = jnp.full((4, 4, 1), self.top)
        return (), Step(obs, jax.nn.one_hot(action, 2), jnp.zeros(()), no, no, no)


def test_pictures_of_ones_own_environment_lie_between_0_and_1(monkeypatch):
    for top in (1.0, 255.0):
        monkeypatch.setattr(device, 'make', lambda name, top=top, **options: Bright(top))
        game = DeviceGame('my_lab.envs:Bright', {})
        if top == 1.0:
            game.check()
        else:
            with pytest.raises(UserError, match='pictures of float32 with numbers from 255 to 255'):
                game.check()
