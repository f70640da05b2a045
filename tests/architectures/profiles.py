"""How many random networks: 75 a test, 15 programs, the same every time, unless `make fuzz` asks for more."""

import os

from hypothesis import HealthCheck, settings

__all__ = ["PROGRAMS", "RUN"]

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("architectures", max_examples=75, derandomize=True, database=None, **_COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2500")), print_blob=True, **_COMMON
)
RUN = settings(settings.get_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "architectures"))
PROGRAMS = RUN if "FUZZ_EXAMPLES" in os.environ else settings(RUN, max_examples=15)
