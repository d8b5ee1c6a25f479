"""The places where objects, keys and executions live: one package per backend, behind the same ports."""
