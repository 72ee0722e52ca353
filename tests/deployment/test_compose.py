"""compose.yaml names what exists: settings, placeholders, times. (`make lint` checks it against the schema.)"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.config import Settings
from tests.support.servers import ROOT, run
from tests.support.tools import require_tools

TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "server")


@pytest.mark.parametrize("name", OURS)
def test_the_server_gets_settings_that_exist_and_nothing_of_others(name: str) -> None:
    names = SERVICES[name]["environment"].keys()
    assert {one.lower() for one in names} <= Settings.model_fields.keys()
    assert "MYSQL_ROOT_PASSWORD" not in str(SERVICES[name])


def test_the_image_sets_settings_that_exist() -> None:
    [block] = re.findall(r"^ENV (.+?[^\\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"(\w+)=", block)) - {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


@pytest.mark.parametrize("name", ["SECRET_KEY", "DB_PASSWORD", "MYSQL_ROOT_PASSWORD"])
def test_without_a_secret_nothing_starts_and_a_sentence_says_why(name: str) -> None:
    uses = re.findall(r"\$\{" + name + r"\b([^}]*)\}", TEXT)
    assert uses
    assert all(re.fullmatch(r":\?set it in \.env, .+", use) for use in uses)


@pytest.mark.parametrize("page", ["README.md", "README.ru.md", "docs/operations.md"])
@pytest.mark.parametrize("copied", [True, False])
def test_the_secrets_are_made_for_their_owner_only_and_the_placeholder_gives_way(
    page: str, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tools(["openssl"], "openssl")
    text = (ROOT / page).read_text(encoding="utf-8")
    [commands] = re.findall(r"```bash\n((?:.*\n)?for name in SECRET_KEY .*\n)", text)
    env = tmp_path / ".env"
    if copied:
        shutil.copyfile(ROOT / ".env.example", env)
    done = run(["bash", "-euc", f"umask 022\n{commands}"], cwd=tmp_path, env=dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    monkeypatch.delenv("SECRET_KEY")
    settings = Settings(_env_file=env, environment="production")
    assert len(settings.secret_key.get_secret_value()) == 64
    assert len(settings.db_password.get_secret_value()) == 64


def test_the_server_and_mysql_know_each_other() -> None:
    server, mysql = SERVICES["server"]["environment"], SERVICES["mysql"]["environment"]
    assert server["DB_HOST"] in SERVICES
    assert server["DB_NAME"] == mysql["MYSQL_DATABASE"]
    assert server["DB_USER"] == mysql["MYSQL_USER"]
    assert server["DB_PASSWORD"] == mysql["MYSQL_PASSWORD"]
    for name in OURS:
        assert set(SERVICES[name]["networks"]) & set(SERVICES["mysql"]["networks"])


def test_the_server_starts_after_a_migration_on_a_healthy_database() -> None:
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["migrate"]["depends_on"]["mysql"]["condition"] == "service_healthy"
    assert SERVICES["server"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert "healthcheck" in SERVICES["mysql"]


def test_a_stop_is_given_more_time_than_it_takes() -> None:
    grace = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["shutdown_seconds"].default * 1.5


@pytest.mark.parametrize("name", OURS)
def test_the_server_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service, "the image's own is none that has rights"


def test_what_is_acknowledged_survives_a_power_cut() -> None:
    assert {"--innodb-flush-log-at-trx-commit=1", "--sync-binlog=1"} <= set(SERVICES["mysql"]["command"])
    assert "mysql:/var/lib/mysql" in SERVICES["mysql"]["volumes"]
    assert "data:/data" in SERVICES["server"]["volumes"]
    assert {"mysql", "data"} <= COMPOSE["volumes"].keys()


def test_only_the_proxy_is_reachable_from_other_machines_and_only_it_is_believed() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert name == "nginx" or port.startswith("127.0.0.1:"), (name, port)
    [edge] = COMPOSE["networks"]["edge"]["ipam"]["config"]
    assert SERVICES["server"]["environment"]["FORWARDED_ALLOW_IPS"] == edge["subnet"]
    assert ipaddress.ip_network(edge["subnet"].partition(":-")[2].rstrip("}")).is_private
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert SERVICES["nginx"]["networks"] == ["edge"]


def test_the_proxy_gets_every_value_that_its_template_asks_for() -> None:
    template = (ROOT / "deploy/nginx.conf.template").read_text()
    asked = set(re.findall(r"\$\{(DIALECT_[A-Z_]+)\}", template))
    nginx = SERVICES["nginx"]
    assert asked == nginx["environment"].keys() - {"NGINX_ENVSUBST_FILTER"}
    assert all(re.search(nginx["environment"]["NGINX_ENVSUBST_FILTER"], name) for name in asked)
    assert any(volume.startswith("./deploy/nginx.conf.template:") for volume in nginx["volumes"])
    assert nginx["environment"]["DIALECT_UPSTREAM"].partition(":")[0] in SERVICES


def test_what_comes_later_or_not_always_starts_only_when_asked_for() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"redis", "nginx"}
