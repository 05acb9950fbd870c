from tests.unit.orchestrator.conftest import real_log as real_log
from tests.unit.orchestrator.conftest import run as run
from tests.unit.orchestrator.conftest import trained_run as trained_run
