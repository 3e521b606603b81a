"""The protocols are checked at run time while tests run, so isinstance must work on them."""

import typing

from reverie import types

for protocol in (types.Agent, types.Source):
    typing.runtime_checkable(protocol)
