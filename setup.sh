#!/usr/bin/env bash
# What the targets of the Makefile need on this machine. Whatever is there already is left alone.
#   ./setup.sh system        Debian packages: MariaDB, FUSE, and what it takes to build mysqlclient
#   ./setup.sh celery        Debian packages: PostgreSQL and Redis, for the test of Celery's workers
#   ./setup.sh venv          .venv, exactly as the lock files say
#   ./setup.sh mc            .venv/mc: MinIO's client, where this machine's package source has it and there is none yet
#   ./setup.sh fuse          changes nothing: fails where nothing can be mounted
#   ./setup.sh engine        Debian packages: Docker and debootstrap, for the test of the Compose stack, where no engine runs
#   ./setup.sh compose ...   runs docker compose with the given arguments, and installs it where it is missing
# PYTHON chooses the interpreter (3.11 or later); default: python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
UV_VERSION=0.13.8

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# /usr/sbin is not on the PATH of an ordinary Debian user, and mariadbd is there.
have() { PATH=$PATH:/usr/sbin command -v "$1" >/dev/null; }

check_python() {
  have "$PYTHON" || die "no $PYTHON here: install Python 3.11 or later, or name it: make PYTHON=/path/to/python3.11"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$PYTHON is $("$PYTHON" -V 2>&1), 3.11 or later is needed: make PYTHON=/path/to/python3.11"
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

install_packages() {
  if ((EUID != 0)); then
    have sudo || die "missing: $* (you are not root and there is no sudo: install them, then run this again)"
    sudo true || die "missing: $* (sudo refused: install them, then run this again)"
  fi
  have apt-get || die "missing: $* (Debian's names; there is no apt-get here: install them, then run this again)"
  say "installing with apt-get: $*"
  local log
  log=$(mktemp)
  # A broken third-party source fails the update and need not matter to us: the install decides.
  as_root apt-get update -qq >"$log" 2>&1 || say "apt-get update had errors, going on with the lists there are"
  if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >>"$log" 2>&1; then
    die "apt-get could not install $*: $(grep -m1 '^E:' "$log" || tail -n1 "$log") (all of it: $log)"
  fi
  rm -f "$log"
}

system() {
  check_python
  local missing=() python headers ensurepip
  read -r python headers ensurepip < <("$PYTHON" - <<'PY'
import importlib.util, pathlib, sys, sysconfig
headers = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()
print(f"python3.{sys.version_info.minor}", int(headers), int(importlib.util.find_spec("ensurepip") is not None))
PY
  )
  # The -core packages: the lab runs a server of its own, and mariadb-server would start a system service.
  have mariadbd && have mariadb-install-db || missing+=(mariadb-server-core)
  have my_print_defaults || missing+=(mariadb-client-core)
  have fusermount3 || missing+=(fuse3)
  # mysqlclient comes as source only; libc6-dev is a mere recommendation of gcc.
  have gcc || missing+=(gcc libc6-dev)
  have pkg-config || missing+=(pkg-config)
  pkg-config --exists mysqlclient 2>/dev/null || pkg-config --exists libmariadb 2>/dev/null || missing+=(libmariadb-dev)
  ((headers)) || missing+=("$python-dev")
  ((ensurepip)) || missing+=("$python-venv")
  ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
}

# Neither may start a service. Redis's server is also in redis-tools, as redis-check-rdb; PostgreSQL's service starts the
# clusters that there are, and its package makes one unless it is told not to.
celery() {
  have redis-check-rdb || install_packages redis-tools
  if compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then return; fi
  install_packages postgresql-common
  local folder=/etc/postgresql-common/createcluster.d
  as_root mkdir -p "$folder"
  trap "as_root rm -f $folder/none.conf" EXIT
  as_root tee "$folder/none.conf" <<<'create_main_cluster = off' >/dev/null
  install_packages postgresql
}

venv() {
  check_python
  if [[ ! -x .venv/bin/python ]]; then
    say "creating .venv with $("$PYTHON" -V)"
    "$PYTHON" -m venv .venv
  fi
  # Beside site-packages, which `uv pip sync` empties of whatever the locks do not name.
  local uv=.venv/uv/bin/uv
  if [[ $("$uv" --version 2>/dev/null) != "uv $UV_VERSION"* ]]; then
    say "installing uv $UV_VERSION into .venv"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    rm -rf .venv/uv
    .venv/bin/python -m pip install -q --disable-pip-version-check --target .venv/uv --no-deps --only-binary :all: \
      --require-hashes -r /dev/stdin <<UV || die "pip could not install uv $UV_VERSION (see above)"
uv==$UV_VERSION \
    --hash=sha256:e18a57b8b352eb7c8feb317b9f6f533c8f0ad9673fd6cf34bbe3cf1a9f6a8984 \
    --hash=sha256:0b3e8b1a4f5e405e31e2ff33de8af4744831e9f7338539671efbd8c3c94e791d
UV
  fi
  say "installing requirements.txt and requirements-dev.txt into .venv"
  "$uv" pip sync -q --compile-bytecode --python .venv/bin/python --require-hashes requirements.txt requirements-dev.txt ||
    die "uv could not install the lock files (see above)"
}

# No error where it cannot be had: it is one engine of several, and its tests skip, except with CI set.
mc() {
  local name
  for name in minio-client mcli mc .venv/mc/usr/bin/minio-client; do
    # Midnight Commander is called mc too.
    if [[ $(command "$name" --version 2>/dev/null </dev/null) == *MinIO* ]]; then return; fi
  done
  have apt-get || { say "no MinIO client here, and no apt-get: the engine mc cannot be used"; return; }
  say "unpacking minio-client into .venv/mc"
  rm -rf .venv/mc
  mkdir -p .venv/mc/lists/partial .venv/mc/cache/archives/partial
  local folder log=.venv/mc/log options=() suite
  folder=$(readlink -f .venv/mc)
  if ! apt-cache policy minio-client 2>/dev/null | grep -q 'Candidate: [0-9]'; then
    # Debian has it from 13 on. Its package needs nothing that 12 lacks, and 12's keyring knows the keys of 13.
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
      awk -v own="$suite" -v suite="${suite/bookworm/trixie}" '$2 == own && $3 ~ /^(main|universe)$/ { print "deb", $1, suite, $3 }' |
      sort -u >"$folder/sources.list" || true
    options=(-o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
      -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Acquire::Languages=none)
    apt-get "${options[@]}" -o APT::Sandbox::User=root update -qq >"$log" 2>&1 || true
  fi
  if (cd "$folder" && apt-get "${options[@]}" -o APT::Sandbox::User=root download -qq minio-client) >>"$log" 2>&1 &&
    dpkg-deb -x .venv/mc/minio-client_*.deb .venv/mc && .venv/mc/usr/bin/minio-client --version >>"$log" 2>&1; then
    rm -rf .venv/mc/{lists,cache,minio-client_*.deb,usr/share}
  else
    rm -rf .venv/mc/{lists,cache,usr}
    say "minio-client could not be had: the engine mc cannot be used (see $log)"
  fi
}

fuse() {
  [[ -c /dev/fuse ]] ||
    die "no /dev/fuse, so nothing can be mounted: modprobe fuse; a container needs --device /dev/fuse --cap-add SYS_ADMIN"
}

# The test starts an engine of its own where none runs, and makes its base images where none can be pulled.
engine() {
  if docker info >/dev/null 2>&1 || { have dockerd && have debootstrap; }; then return; fi
  install_packages docker.io debootstrap
}

# Prints how to call Docker Compose: no engine is needed to check a file with it.
find_compose() {
  local candidate
  for candidate in "docker compose" docker-compose /usr/libexec/docker/cli-plugins/docker-compose; do
    if $candidate version >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

compose() {
  local command
  if ! command=$(find_compose); then
    local package=docker-compose
    # Ubuntu's name for version 2; its docker-compose is the old one, which its Python no longer runs.
    if have apt-cache && apt-cache show docker-compose-v2 >/dev/null 2>&1; then package=docker-compose-v2; fi
    install_packages "$package"
    command=$(find_compose) || die "$package is installed and does not run: try '$package version'"
  fi
  exec $command "$@"
}

case ${1:-} in
  system | celery | venv | mc | fuse | engine | compose) "$@" ;;
  *) die "usage: ./setup.sh system|celery|venv|mc|fuse|engine|compose ..." ;;
esac
