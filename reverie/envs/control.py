"""Pendulum and cart-pole swing-up on the device: DeepMind Control's models written out as equations
of motion.

Same observations, rewards, step sizes, initial states and 1,000 control steps as dm_control's
`pendulum swingup` and `cartpole swingup` (Tassa et al. 2018, section 6.1), whose numbers they
follow step by step. They differ in that they compute in float32, and that chance comes from another
generator.

Angles are measured from upright, in the direction that moves the tip towards +x.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.envs.options import typed
from reverie.types import ActionSpace, EnvSpec, Step, UserError

GRAVITY = 9.81  # m / s^2
CONTROL_STEPS = 1000


class State(NamedTuple):
    """Positions and velocities in metres, radians and seconds."""

    q: Float[Array, ' dof']
    v: Float[Array, ' dof']


@runtime_checkable
class System(Protocol):
    """Mechanical system and its task."""

    name: str
    obs: tuple[str, ...]  # names of the observed numbers
    push: str  # name of the action

    def begin(self, key: PRNGKeyArray) -> State: ...

    def advance(self, state: State, control: Float[Array, '']) -> State: ...

    def observe(self, state: State) -> Float[Array, ' obs']: ...

    def reward(self, state: State, control: Float[Array, '']) -> Float[Array, '']: ...


def tolerance(x: Float[Array, ''], margin: float) -> Float[Array, '']:
    """Gaussian that is 1 at x = 0 and 0.1 at |x| = margin."""
    return 0.1 ** ((x / margin) ** 2)


@dataclasses.dataclass(frozen=True)
class Pendulum:
    """Point-like ball on a massless rod, with a motor too weak to lift it in one go. 0.02 s per
    step.
    """

    name = 'control/pendulum'
    obs = ('cos of the angle', 'sin of the angle', 'angular velocity')
    push = 'torque'

    step_s: float = 0.02
    mass: float = 1.0  # kg
    length: float = 0.5  # m
    radius: float = 0.05  # m, the ball's
    damping: float = 0.1  # N m s
    upright: float = 8.0  # degrees within which the reward is 1

    def begin(self, key: PRNGKeyArray) -> State:
        return State(jax.random.uniform(key, (1,), minval=-jnp.pi, maxval=jnp.pi), jnp.zeros(1))

    def advance(self, state: State, control: Float[Array, '']) -> State:
        """Semi-implicit Euler, the damping taken at the end of the step."""
        inertia = self.mass * (self.length**2 + 0.4 * self.radius**2)
        weight = self.mass * GRAVITY * self.length * jnp.sin(state.q)
        torque = control + weight - self.damping * state.v
        v = state.v + self.step_s * torque / (inertia + self.step_s * self.damping)
        return State(state.q + self.step_s * v, v)

    def observe(self, state: State) -> Float[Array, ' 3']:
        """Observe cos, sin and angular velocity."""
        return jnp.concatenate([jnp.cos(state.q), jnp.sin(state.q), state.v])

    def reward(self, state: State, control: Float[Array, '']) -> Float[Array, '']:
        return (jnp.cos(state.q[0]) >= jnp.cos(jnp.deg2rad(self.upright))).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class CartPole:
    """Pole on a cart on a rail of +-1.8 m. 0.01 s per step, Runge-Kutta of fourth order."""

    name = 'control/cartpole_swingup'
    obs = (
        'place of the cart', 'cos of the angle', 'sin of the angle', 'speed of the cart',
        'angular velocity',
    )  # fmt: skip
    push = 'force'

    step_s: float = 0.01
    cart: float = 1.0  # kg
    pole: float = 0.1  # kg
    length: float = 1.0  # m, the pole's without its round ends
    radius: float = 0.045  # m, the pole's
    gear: float = 10.0  # N at control 1
    cart_damping: float = 5e-4  # N s / m
    pole_damping: float = 2e-6  # N m s
    rail: float = 1.8  # m, to each side
    give_s: float = 0.08  # s, time constant of the rail's ends

    @property
    def inertia(self) -> float:
        """Moment of inertia of the pole, a capsule, about its middle, in kg m^2."""
        length, radius = self.length, self.radius
        tube, ball = length * radius**2, 4 / 3 * radius**3  # volumes / pi
        tube, ball = (self.pole * part / (tube + ball) for part in (tube, ball))
        tube *= length**2 / 12 + radius**2 / 4
        ball *= 0.4 * radius**2 + length**2 / 4 + 3 * length * radius / 8
        return tube + ball

    def begin(self, key: PRNGKeyArray) -> State:
        """Start at rest in the middle, hanging, but for noise."""
        q, v = 0.01 * jax.random.normal(key, (2, 2))
        return State(q + jnp.array([0.0, jnp.pi]), v)

    def acceleration(self, state: State, control: Float[Array, '']) -> Float[Array, ' 2']:
        (x, angle), (speed, spin) = state
        arm = self.pole * self.length / 2
        m11, m22 = self.cart + self.pole, self.inertia + arm * self.length / 2
        m12, sin = arm * jnp.cos(angle), jnp.sin(angle)
        det = m11 * m22 - m12**2
        force = self.gear * control - self.cart_damping * speed + arm * sin * spin**2
        torque = arm * GRAVITY * sin - self.pole_damping * spin
        free = (m22 * force - m12 * torque) / det
        force += self._stop(x, speed, free, m22 / det, 1 / (m11 - arm**2 / m22))
        return jnp.stack([m22 * force - m12 * torque, m11 * torque - m12 * force]) / det

    def _stop(
        self, x: Array, speed: Array, free: Array, give: Array, give_upright: float
    ) -> Float[Array, '']:
        """Force of the rail's end, MuJoCo's soft constraint with impedance 0.9 to 0.95 over the
        first millimetre.

        free: acceleration of the cart without it. give: acceleration per force, now and with the
        pole upright.
        """
        side = -jnp.sign(x)
        depth = jnp.abs(x) - self.rail
        part = jnp.clip(depth / 0.001, 0.0, 1.0)
        impedance = 0.9 + 0.05 * jnp.where(part < 0.5, 2 * part**2, 1 - 2 * (1 - part) ** 2)
        time = 0.95 * self.give_s
        wanted = -2 / time * side * speed + impedance * depth / time**2
        force = (wanted - side * free) / (give + (1 - impedance) / impedance * give_upright)
        return jnp.where(depth > 0, side * jnp.maximum(force, 0.0), 0.0)

    def advance(self, state: State, control: Float[Array, '']) -> State:
        def slope(at: State) -> State:
            return State(at.v, self.acceleration(at, control))

        def along(slope: State, share: float) -> State:
            q, v = (x + share * self.step_s * dx for x, dx in zip(state, slope, strict=True))
            return State(q, v)

        k1 = slope(state)
        k2 = slope(along(k1, 0.5))
        k3 = slope(along(k2, 0.5))
        k4 = slope(along(k3, 1.0))
        slopes = zip(k1, k2, k3, k4, strict=True)
        mean = State(*((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in slopes))
        return along(mean, 1.0)

    def observe(self, state: State) -> Float[Array, ' 5']:
        """Observe place, cos, sin, speed and angular velocity."""
        (x, angle), (speed, spin) = state
        return jnp.stack([x, jnp.cos(angle), jnp.sin(angle), speed, spin])

    def reward(self, state: State, control: Float[Array, '']) -> Float[Array, '']:
        (x, angle), (_, spin) = state
        upright = (jnp.cos(angle) + 1) / 2
        centred = (1 + tolerance(x, 2.0)) / 2
        small_control = (4 + jnp.maximum(1 - control**2, 0.0)) / 5
        small_velocity = (1 + tolerance(spin, 5.0)) / 2
        return upright * small_control * small_velocity * centred


@dataclasses.dataclass(frozen=True)
class Control:
    """Environment around a system that never terminates; `envs.device.Vector` runs many."""

    system: System
    action_repeat: int = 1  # control steps per action; rewards are summed

    @property
    def spec(self) -> EnvSpec:
        actions = ActionSpace('continuous', 1, (self.system.push,))
        system, most = self.system, float(CONTROL_STEPS)
        return EnvSpec(
            system.name, (len(system.obs),), actions, max_return=most, channels=system.obs
        )

    def reset(self, key: PRNGKeyArray) -> tuple[State, Step]:
        state = self.system.begin(key)
        return state, self._arrive(state, jnp.zeros(1), jnp.zeros(()), True)

    def step(
        self, state: State, action: Float[Array, ' 1'], key: PRNGKeyArray
    ) -> tuple[State, Step]:
        """Apply `action`, clipped to [-1, 1] for the system; `prev_action` of the result is as
        given.
        """
        control = jnp.clip(action[0], -1.0, 1.0).astype(jnp.float32)

        def once(state: State, _: None) -> tuple[State, Array]:
            state = self.system.advance(state, control)
            return state, self.system.reward(state, control)

        state, rewards = jax.lax.scan(once, state, None, length=self.action_repeat)
        return state, self._arrive(state, action.astype(jnp.float32), rewards.sum(), False)

    def _arrive(self, state: State, action: Array, reward: Array, first: bool) -> Step:
        never = jnp.asarray(False)
        return Step(self.system.observe(state), action, reward, jnp.asarray(first), never, never)


SYSTEMS = {'pendulum': Pendulum, 'cartpole_swingup': CartPole}


def build(name: str, **options: Any) -> tuple[Control, int]:
    """Build the task called `name`; return it with its time limit in steps of `action_repeat`
    control steps each, 1,000 of the latter by default.

    options: action_repeat, time_limit and fields of the system, e.g. damping=0.2. Raises UserError
    for an unknown option, or a value out of range.
    """
    declared: dict[str, Any] = dict(action_repeat=int, time_limit=int | None)
    declared |= {field.name: field.type for field in dataclasses.fields(SYSTEMS[name])}
    options = typed(f'control/{name}', options, declared)
    action_repeat, time_limit = options.pop('action_repeat', 1), options.pop('time_limit', None)
    if action_repeat < 1:
        raise UserError(f'action_repeat={action_repeat} repeats nothing; expected at least 1')
    limit = max(1, CONTROL_STEPS // action_repeat) if time_limit is None else time_limit
    return Control(SYSTEMS[name](**options), action_repeat), limit
