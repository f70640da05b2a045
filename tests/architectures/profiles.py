"""How many random networks: the same few every time, or as many as `make fuzz` asks for."""

import os

from hypothesis import HealthCheck, settings

__all__ = ["LAWS", "PROGRAMS", "RUN"]

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("architectures", max_examples=25, derandomize=True, database=None, **_COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2500")), print_blob=True, **_COMMON
)
RUN = settings(settings.get_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "architectures"))
PROGRAMS = RUN if "FUZZ_EXAMPLES" in os.environ else settings(RUN, max_examples=8)
LAWS = RUN if "FUZZ_EXAMPLES" in os.environ else settings(RUN, max_examples=10)
