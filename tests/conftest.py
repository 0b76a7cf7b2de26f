"""Settings of all tests: the CPU backend, and the run's log where pytest captures it."""

import logging
import os
import pathlib
import re
import socket

# Before any test imports jax: the suite must give the same figures on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM optimizing programs that run once, and MLIR emitting their fusions, would more than double
# the suite's time. Of what is left of compiling, a quarter would be splitting each program for
# cores that other tests keep busy. Tests that start processes pass this on.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Nothing in the user's cache folder; JAX_COMPILATION_CACHE_DIR shares programs between tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["TOKENFLOW_COMPILE_CACHE"] = "off"
# Programs that tests start import the package, the golden vectors and the helpers.
_TESTS = pathlib.Path(__file__).parent
_PATHS = map(str, (_TESTS.parent, _TESTS, _TESTS / "helpers"))
os.environ["PYTHONPATH"] = os.pathsep.join((*_PATHS, os.environ.get("PYTHONPATH", "")))

# Where the bucket of `bucket` is served, for gcsfs, array_record and TensorStore, also in programs
# that tests start. The last variable skips gcsfs' search for the kind of bucket.
with socket.socket() as _bucket, socket.socket() as _hub:
    _bucket.bind(("127.0.0.1", 0))
    _hub.bind(("127.0.0.1", 0))
    _PORT, _HUB_PORT = _bucket.getsockname()[1], _hub.getsockname()[1]
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_HUB_PORT}"
for _name in (
    "STORAGE_EMULATOR_HOST",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "TENSORSTORE_GCS_HTTP_URL",
):
    os.environ[_name] = f"http://127.0.0.1:{_PORT}"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import pytest  # noqa: E402 - after the environment is set


@pytest.fixture(scope="session")
def bucket_server():
    """An emulator of Google's object store in this process."""
    pytest.importorskip("gcsfs")
    running = pytest.importorskip("bucket_emulator").start(_PORT)
    yield
    running.stop()


@pytest.fixture
def bucket(bucket_server, request, tmp_path_factory, monkeypatch):
    """A folder in a bucket, gs://bucket/..., of this test, and a cache folder of its own.

    The test fails where anything takes the address for a path and makes a local folder "gs:".
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(here := tmp_path_factory.mktemp("here"))
    yield "gs://bucket/" + re.sub(r"\W", "_", request.node.name)
    assert not [path for path in here.rglob("*") if path.name.endswith(":")]


@pytest.fixture(autouse=True)
def run_log(caplog, monkeypatch):
    """Lets pytest capture the progress lines of a run, also after a program took the log over."""
    monkeypatch.setattr(logging.getLogger("tokenflow_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="tokenflow_jax"):
        yield


@pytest.fixture(scope="session")
def hub_server():
    """A stand-in for the Hugging Face hub, to which $HF_ENDPOINT points."""
    import hub_server

    served = hub_server.Hub(_HUB_PORT)
    yield served
    served.close()


@pytest.fixture
def models(hub_server, tmp_path_factory, monkeypatch):
    """The stand-in for the hub, without models, and a cache of this test."""
    constants = pytest.importorskip("huggingface_hub.constants")
    from tokenflow_jax import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    hub_server.models.clear()
    hub_server.requests.clear()
    hub.fetch.cache_clear()
    yield hub_server
    hub.fetch.cache_clear()
