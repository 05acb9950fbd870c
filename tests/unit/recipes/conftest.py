from tests.unit.training.conftest import make_trainer as make_trainer
