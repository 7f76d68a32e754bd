"""Supervisor and workers: rights, death, replacement, exhaustion."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import DaemonError, Gateway, TcpService, UdpService, eventually, tproxyd


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def echoed(connection: socket.socket, data: bytes = b"ping") -> bool:
    connection.sendall(data)
    return connection.recv(len(data)) == data


def test_workers_hold_two_capabilities_and_their_own_user(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(workers=2)
    workers = running.worker_pids()
    assert len(workers) == 2
    for pid in workers:
        status = status_of(pid)
        kept = f"{1 << 10 | 1 << 13:016x}"  # CAP_NET_BIND_SERVICE, CAP_NET_RAW
        assert (status["CapPrm"], status["CapEff"], status["CapBnd"]) == (kept, kept, kept)
        assert (status["CapInh"], status["CapAmb"]) == ("0" * 16, "0" * 16)
        assert status["NoNewPrivs"] == "1"
        assert set(status["Uid"].split()) == {str(pwd.getpwnam("nobody").pw_uid)}
        assert set(status["Gid"].split()) == {str(pwd.getpwnam("nobody").pw_gid)}
        assert status["Groups"] == ""


def test_unknown_user_is_named_and_nothing_is_left(lab: Gateway, daemon: DaemonFactory) -> None:
    with pytest.raises(DaemonError) as caught:
        daemon(user="no-such-user")
    assert caught.value.code == 1
    assert "no user 'no-such-user'" in caught.value.log


def test_port_in_use_is_named_and_nothing_is_left(lab: Gateway, daemon: DaemonFactory) -> None:
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind(("127.0.0.1", 7440))
        holder.listen()
        with pytest.raises(DaemonError) as caught:
            daemon()
    assert caught.value.code == 1
    assert "7440" in caught.value.log
    assert "Traceback" not in caught.value.log


def test_a_dead_worker_is_replaced_and_the_others_go_on(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(workers=2)
    with TcpService(lab.server, lab.server_address(4)) as service:
        connections = [lab.client.tcp(service.address) for _ in range(20)]
        assert all(echoed(connection) for connection in connections)
        victim, survivor = running.worker_pids()
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(set(running.worker_pids()) - {victim}) == 2, "a new worker is there")
        assert survivor in running.worker_pids()
        lost = 0
        for connection in connections:
            try:
                assert echoed(connection)
            except (ConnectionResetError, BrokenPipeError):
                lost += 1
        assert 0 < lost < len(connections), "the victim's flows are reset, the others go on"
        for _ in range(20):
            with lab.client.tcp(service.address) as connection:
                assert echoed(connection)
        for connection in connections:
            connection.close()
    assert any("signal 9" in message for message in running.messages())


def test_a_dead_workers_queue_is_served_by_the_next(lab: Gateway, daemon: DaemonFactory) -> None:
    """The listening socket outlives the worker, so a client that comes in between only waits."""
    running = daemon(workers=1)
    with TcpService(lab.server, lab.server_address(4)) as service:
        (worker,) = running.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        waiting = [lab.client.tcp(service.address) for _ in range(5)]
        os.kill(worker, signal.SIGKILL)
        assert all(echoed(connection) for connection in waiting)
        for connection in waiting:
            connection.close()


def test_workers_end_with_their_last_flow_when_the_supervisor_dies(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(workers=1)
    with TcpService(lab.server, lab.server_address(4)) as service:
        connection = lab.client.tcp(service.address)
        assert echoed(connection)
        (worker,) = running.worker_pids()
        running.killed = True
        running.process.kill()
        running.process.wait()
        time.sleep(0.3)
        assert echoed(connection), "running flows go on"
        with pytest.raises(OSError, match=r"timed out|reset"):  # on_failure: closed
            echoed(lab.client.tcp(service.address, timeout_s=0.7))
        connection.close()
        eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker ends with its last flow")


def attempt(lab: Gateway, address: tuple[str, int]) -> socket.socket | None:
    """A connection, or None where it was reset at once."""
    try:
        return lab.client.tcp(address)
    except ConnectionResetError:
        return None


def test_out_of_descriptors_it_pauses_and_goes_on(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(under=["prlimit", "--nofile=40:40"])
    (worker,) = running.worker_pids()
    with TcpService(lab.server, lab.server_address(4)) as service, UdpService(lab.server, lab.server_address(4)) as udp:
        first = lab.client.tcp(service.address)
        assert echoed(first)
        crowd = [each for each in (attempt(lab, service.address) for _ in range(30)) if each]
        with lab.client.udp(udp.address) as client:
            client.send(b"no descriptor left for this one")
        spent = cpu_seconds(worker)
        time.sleep(1)
        assert cpu_seconds(worker) - spent < 0.3, "it waits, it does not spin"
        assert echoed(first), "running flows are served meanwhile"
        assert running.counters()["accept_pauses"] > 0
        for connection in crowd:
            connection.close()

        def served() -> bool:
            try:
                with lab.client.tcp(service.address) as connection:
                    return echoed(connection)
            except OSError:
                return False

        assert eventually(served, "it goes on by itself")
        first.close()
    assert running.worker_pids() == [worker]
    assert running.counters()["flow_errors"] == 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_descriptor_is_left_behind_by_short_flows(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(workers=1)
    (worker,) = running.worker_pids()

    def descriptors() -> int:
        return len(list(Path(f"/proc/{worker}/fd").iterdir()))

    with TcpService(lab.server, lab.server_address(4)) as service, UdpService(lab.server, lab.server_address(4)) as udp:
        before = descriptors()
        for _ in range(300):
            with lab.client.tcp(service.address) as connection:
                assert echoed(connection)
            with lab.client.udp(udp.address) as client:
                client.send(b"x")
                assert client.recv(1) == b"x"
        eventually(lambda: running.recent_counters()["flows"] == 0, "all flows have ended")
        eventually(lambda: descriptors() == before, f"{before} descriptors are open as before")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_resets_flows_and_removes_the_rules(lab: Gateway, daemon: DaemonFactory, number: int) -> None:
    running = daemon()
    with TcpService(lab.server, lab.server_address(4)) as service:
        connection = lab.client.tcp(service.address)
        assert echoed(connection)
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        connection.close()
    assert lab.gateway.run(["nft", "list", "ruleset"]).stdout == ""


def test_keep_rules_leaves_them_for_the_next_start(lab: Gateway, daemon: DaemonFactory) -> None:
    first = daemon(None, "--keep-rules")
    held = lab.gateway.run(["nft", "list", "ruleset"]).stdout
    first.stop()
    assert lab.gateway.run(["nft", "list", "ruleset"]).stdout == held
    daemon().stop()


def test_a_second_daemon_in_the_namespace_is_refused(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon()
    done = tproxyd(lab.gateway, "run", "-c", running.path)
    assert done.returncode == 75
    assert "another tproxyd runs" in done.stderr
    with TcpService(lab.server, lab.server_address(4)) as service, lab.client.tcp(service.address) as connection:
        assert echoed(connection)


def test_readiness_is_told_to_the_service_manager(lab: Gateway, tmp_path: Path) -> None:
    config = tmp_path / "tproxyd.yaml"
    config.write_text("interception: {interfaces: [lan0]}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        process = lab.gateway.popen(
            [sys.executable, "-P", "-m", "tproxyd", "run", "-c", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.DEVNULL,
        )
        assert manager.recv(100) == b"READY=1"
        process.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert process.wait(10) == 0


def test_a_hung_worker_is_replaced(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(workers=2)
    victim, survivor = running.worker_pids()
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: victim not in running.worker_pids() and len(running.worker_pids()) == 2, "it is replaced", 20)
    assert survivor in running.worker_pids()
    with TcpService(lab.server, lab.server_address(4)) as service:
        for _ in range(20):
            with lab.client.tcp(service.address) as connection:
                assert echoed(connection)
    assert any("has not answered" in message for message in running.messages())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_for_the_supervisor_do_the_workers_no_harm(
    lab: Gateway, daemon: DaemonFactory, number: signal.Signals
) -> None:
    running = daemon(workers=2)
    workers = running.worker_pids()
    with TcpService(lab.server, lab.server_address(4)) as service, lab.client.tcp(service.address) as connection:
        assert echoed(connection)
        for pid in running.pids():
            os.kill(pid, number)
        time.sleep(0.3)
        assert echoed(connection)
    assert running.running
    assert running.worker_pids() == workers


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7])
def test_sigterm_while_starting_leaves_nothing_behind(lab: Gateway, tmp_path: Path, delay_s: float) -> None:
    config = tmp_path / "tproxyd.yaml"
    config.write_text("interception: {interfaces: [lan0]}\n")
    with (tmp_path / "log").open("wb") as log:
        process = lab.gateway.popen(
            [sys.executable, "-P", "-m", "tproxyd", "run", "-c", str(config)], stdout=log, stderr=log
        )
        time.sleep(delay_s)
        process.terminate()
        assert process.wait(10) in (0, -signal.SIGTERM)
    eventually(lambda: not lab.gateway.pids(), "all processes have ended")
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_it_serves_and_stops_without_its_standard_files(lab: Gateway, tmp_path: Path, closed: str) -> None:
    config = tmp_path / "tproxyd.yaml"
    config.write_text("interception: {interfaces: [lan0]}\n")
    command = f"exec {sys.executable} -P -m tproxyd run -c {config} {closed}"
    process = lab.gateway.popen(["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with TcpService(lab.server, lab.server_address(4)) as service:

        def served() -> bool:
            try:
                with lab.client.tcp(service.address, timeout_s=0.5) as connection:
                    return echoed(connection)
            except OSError:
                return False

        eventually(served, "it serves", 15)
    process.terminate()
    assert process.wait(10) == 0


def test_a_log_that_nobody_reads_stops_no_flow(lab: Gateway, tmp_path: Path) -> None:
    config = tmp_path / "tproxyd.yaml"
    config.write_text("interception: {interfaces: [lan0]}\nlogging: {flows: true}\nworkers: 1\n")
    process = lab.gateway.popen(
        [sys.executable, "-P", "-m", "tproxyd", "run", "-c", str(config)], stderr=subprocess.PIPE, pipesize=4096
    )
    assert process.stderr is not None
    assert any(b"serving" in line for line in process.stderr)
    with TcpService(lab.server, lab.server_address(4)) as service:
        for _ in range(200):
            with lab.client.tcp(service.address) as connection:
                assert echoed(connection)
    process.terminate()
    assert process.wait(10) == 0
