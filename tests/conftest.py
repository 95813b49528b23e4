# SPDX-License-Identifier: MIT
"""Settings of Hypothesis for all tests."""

from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("namedmask", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("namedmask")
