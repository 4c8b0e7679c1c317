"""Debian's own Prometheus scrapes a loaded server, and every expression of the dashboard returns data."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import AdamW, Client, LayerLora
from support.raw import RawMember
from support.server import ServerProcess
from support.waiting import wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "kt-expert.json").read_text(encoding="utf-8"))
EXPRESSIONS = sorted({target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]})
READY_TIMEOUT_S = 60.0
VARIABLES = {"$__rate_interval": "1m", "$job": ".+", "$instance": ".+"}
METRIC = re.compile(r"\b(?:kt_expert|grpc_server|process)_[a-z_]+")


class Prometheus:
    """Debian's prometheus on a free port, with the shipped configuration pointed at one server."""

    def __init__(self, directory: Path, target: str) -> None:
        config = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
        config = config.replace("127.0.0.1:9464", target).replace("scrape_interval: 10s", "scrape_interval: 250ms")
        path = directory / "prometheus.yml"
        path.write_text(config.replace("250ms\n", "250ms\n  scrape_timeout: 250ms\n"), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._log = (directory / "prometheus.log").open("w", encoding="utf-8")
        executable = shutil.which("prometheus")
        assert executable, "Debian's prometheus is needed: apt-get install prometheus"
        self._process = subprocess.Popen(
            [
                executable,
                f"--config.file={path}",
                f"--web.listen-address={self.address}",
                f"--storage.tsdb.path={directory / 'data'}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str) -> list[Any]:
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{question}", timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def wait_for(self, expression: str) -> list[Any]:
        """The result, once there is one with a value that is a number."""
        found: list[Any] = []

        def answered() -> bool:
            try:
                found[:] = [row for row in self.query(expression) if row["value"][1] != "NaN"]
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # listening, and not ready yet
                    error.close()
                    return False
                raise AssertionError(f"{expression}: {error.read().decode()}") from None
            except OSError:  # not listening yet
                return False
            return bool(found)

        wait_until(answered, READY_TIMEOUT_S, f"data for {expression}")
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def use_everything(client: Client, address: str, name: str) -> None:
    """Traffic that touches every metric: both passes, steps, checkpoints, errors and a repeated request."""
    run = client.open_run(lora=[LayerLora(0, rank_down=4, scale_down=1.0)], wire_dtype="fp32")
    x, ids, weights = torch.randn(64, 32), torch.randint(8, (64, 2)), torch.rand(64, 2)
    for _ in range(3):
        handle = run.submit_forward(0, x, ids, weights)
        run.submit_backward(0, handle.ticket, handle.result()).result()
        run.step(AdamW(1e-3))
    run.submit_forward(0, x, ids, weights).result()
    run.save_checkpoint(name)
    run.load_checkpoint(name)
    with pytest.raises(kt.InvalidRequest):
        run.submit_forward(0, x, ids + 100, weights).result()
    client.status()
    with RawMember(address, f"raw-{name}") as raw:
        raw.ask(raw.forward_frames(raw.take_id()))


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), server.metrics_address)
    with kt.connect(server.address) as client:
        started.wait_for("up == 1")
        use_everything(client, server.address, "dashboard-1")
        started.wait_for("kt_expert_checkpoint_seconds_count > 0")
        # Counters have been seen once; a second round gives rate() something to see.
        use_everything(client, server.address, "dashboard-2")
        yield started
    started.stop()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_of_the_dashboard_returns_data(prometheus: Prometheus, expression: str) -> None:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert prometheus.wait_for(expression)


def test_the_exposition_follows_the_conventions(server: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    assert promtool
    status, text = server.get("/metrics")
    assert status == 200
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    config = DEPLOY / "prometheus" / "prometheus.yml"
    checked = subprocess.run([promtool, "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_dashboard_and_server_know_the_same_metrics(server: ServerProcess) -> None:
    shown = {name for expression in EXPRESSIONS for name in METRIC.findall(expression)}
    exposed = set(METRIC.findall(server.get("/metrics")[1]))
    assert shown <= exposed
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = set(re.findall(r"# TYPE (kt_expert_\w+)", server.get("/metrics")[1]))
    assert ours == families & ours, f"on no panel: {sorted(ours - families)}"


def test_health_pages(server: ServerProcess) -> None:
    assert server.get("/livez") == (200, "alive\n")
    assert server.get("/readyz") == (200, "ready\n")
    assert server.get("/nowhere")[0] == 404
    with socket.create_connection(tuple(server.metrics_address.split(":")), timeout=10) as connection:  # type: ignore[arg-type]
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 40")
