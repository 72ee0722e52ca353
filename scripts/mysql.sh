#!/usr/bin/env bash
# A real, throwaway MySQL 8+ for tests and benchmarks, without Docker.
#
#   scripts/mysql.sh start    start it (install and initialise it first if need be) and print its URL
#   scripts/mysql.sh stop     stop it; its files stay, so that the next start takes seconds
#   scripts/mysql.sh status   say whether it runs; exit status 0 if it does, 3 if it does not
#   scripts/mysql.sh url      print mysql://root:PASSWORD@127.0.0.1:PORT/ of the running server
#
# A `mysqld` of MySQL 8 or newer on PATH is used as it is. Otherwise (Debian and its relatives, as root) Debian's
# unstable suite is unpacked into a folder of its own and its mysqld runs there in a chroot: it needs a newer libc
# than the stable suite has. Durability is MySQL's default on purpose: tests and benchmarks must see the real price of
# a commit.
#
# DIALECT_MYSQL_DIR   where everything is kept       (default /var/tmp/dialect-mysql)
# DIALECT_MYSQL_PORT  the port, on 127.0.0.1 only    (default 33306)
# DIALECT_MYSQL_ROOTFS  the unpacked Debian of another such folder, to be used as well as there: a second server, to be
#                     killed and frozen, then costs no second unpacking (the default is a rootfs in DIALECT_MYSQL_DIR)
# DIALECT_MYSQL_OPTIONS  more options of mysqld, separated by spaces, e.g. --innodb-buffer-pool-size=4G

set -euo pipefail

dir=${DIALECT_MYSQL_DIR:-/var/tmp/dialect-mysql}
port=${DIALECT_MYSQL_PORT:-33306}
rootfs=${DIALECT_MYSQL_ROOTFS:-$dir/rootfs}

say() { printf 'mysql.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case $dir in
  /*) ;;
  *) die "DIALECT_MYSQL_DIR must be an absolute path, not '$dir'." ;;
esac
case $port in
  '' | *[!0-9]*) die "DIALECT_MYSQL_PORT must be a number, not '$port'." ;;
esac

# `outer` is the server's folder as we see it, `inner` the same folder as mysqld sees it.
locate() {
  local version
  version=$(mysqld --version 2>/dev/null || true)
  # MariaDB ships a `mysqld` too; it is another database.
  if [[ $version != *MariaDB* && $version =~ Ver\ ([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 8)); then
    kind=host outer=$dir/server inner=$dir/server
  elif [[ $rootfs == "$dir/rootfs" ]]; then
    kind=chroot outer=$rootfs/server inner=/server
  else
    kind=chroot outer=$dir/server inner=/instance
  fi
}

# Runs a command in the chroot. The mounts live in a namespace of their own: they vanish with the last process in it,
# so nothing is left to unmount and no later `rm -r` can reach the real /dev.
in_chroot() {
  # shellcheck disable=SC2016
  unshare --mount --propagation private -- bash -c '
    root=$1 outer=$2 inner=$3; shift 3
    mount --bind /dev "$root/dev" && mount -t proc proc "$root/proc" || exit 70
    [[ $outer == "$root$inner" ]] || mount --bind "$outer" "$root$inner" || exit 70
    exec chroot "$root" "$@"' bash "$rootfs" "$outer" "$inner" "$@"
}

mysqld_run() {
  if [[ $kind == chroot ]]; then
    in_chroot /usr/sbin/mysqld --no-defaults --user=mysql "$@"
  elif ((EUID == 0)); then
    id mysql >/dev/null 2>&1 || die "mysqld does not run as root: create the system user 'mysql', or call this script as another user."
    mysqld --no-defaults --user=mysql "$@"
  else
    mysqld --no-defaults "$@"
  fi
}

owned_by_server() {
  if [[ $kind == chroot ]]; then
    in_chroot chown mysql: "${@/#$outer/$inner}"
  elif ((EUID == 0)); then
    chown mysql: "$@"
  fi
}

server_pid() {
  local pid name
  pid=$(cat "$outer/mysqld.pid" 2>/dev/null) && [[ -n $pid ]] || return 1
  # A pid file outlives a crash or a reboot, and its number may by now belong to somebody else. A bare Debian has no ps.
  name=$(cat "/proc/$pid/comm" 2>/dev/null || ps -p "$pid" -o comm= 2>/dev/null) || return 1
  [[ $name == *mysqld* ]] || return 1
  echo "$pid"
}

server_port() { cat "$outer/port"; }

# A MySQL server speaks first: the fifth byte of its greeting is the protocol version, 10. No client program is needed.
answers() {
  local greeting
  greeting=$( (exec 3<>"/dev/tcp/127.0.0.1/$1" && head -c 5 <&3 | od -An -tx1) 2>/dev/null) || return 1
  [[ $greeting == *0a ]]
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

print_url() { printf 'mysql://root:%s@127.0.0.1:%s/\n' "$(cat "$dir/password")" "$(server_port)"; }

log_tail() {
  say "the last lines of $outer/mysqld.log:"
  tail -n 20 "$outer/mysqld.log" >&2 || true
}

install_server() {
  [[ -x $rootfs/usr/sbin/mysqld ]] && return
  [[ $rootfs == "$dir/rootfs" ]] || die "there is no mysqld in $rootfs: start the server there first, or leave DIALECT_MYSQL_ROOTFS empty."
  [[ $(uname -s) == Linux ]] || die "no MySQL 8+ 'mysqld' on PATH: install MySQL with your system's package manager and call this again."
  if ! command -v debootstrap >/dev/null; then
    command -v apt-get >/dev/null || die "no MySQL 8+ 'mysqld' on PATH and no debootstrap: install either of them and call this again."
    say "installing debootstrap"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap debian-archive-keyring; } \
      >"$dir/apt.log" 2>&1 || die "apt-get could not install debootstrap (see $dir/apt.log): install it by hand and call this again."
  fi
  say "unpacking Debian unstable with mysql-server-core into $rootfs (about 600 MB, a minute or so)"
  rm -rf --one-file-system "$rootfs.partial"
  # Its own mount namespace, because an interrupted debootstrap leaves /proc mounted inside the folder.
  unshare --mount --propagation private -- \
    debootstrap --variant=minbase --include=mysql-server-core sid "$rootfs.partial" >"$dir/debootstrap.log" 2>&1 ||
    die "debootstrap failed (see $dir/debootstrap.log): check the network and the disk, and call this again."
  # A folder of this name is always a whole one.
  rm -rf --one-file-system "$rootfs"
  mv "$rootfs.partial" "$rootfs"
}

initialise() {
  [[ -e $outer/initialised ]] && return
  say "initialising an empty server in $outer"
  rm -rf --one-file-system "$outer"
  mkdir -p "$outer/data" "$rootfs$inner"
  chmod 750 "$outer" "$outer/data"
  if [[ $kind == chroot ]] && ! grep -q '^mysql:' "$rootfs/etc/passwd"; then
    chroot "$rootfs" useradd --system --no-create-home --shell /usr/sbin/nologin mysql
  fi
  owned_by_server "$outer" "$outer/data"
  mysqld_run --initialize-insecure --datadir="$inner/data" --log-error="$inner/mysqld.log" </dev/null >&2 || {
    log_tail
    die "mysqld could not initialise its data folder; it needs the right to mount and chroot, and a folder that it may write to."
  }
  touch "$outer/initialised"
}

start() {
  if [[ $kind == chroot && $EUID != 0 ]]; then
    die "no MySQL 8+ 'mysqld' on PATH: install MySQL, or call this as root so that it can be set up in a chroot."
  fi
  if [[ $kind == chroot ]] && ! unshare --mount --propagation private true 2>/dev/null; then
    die "this container may not mount anything: install MySQL 8+ here, or run the container with CAP_SYS_ADMIN."
  fi
  mkdir -p "$dir"
  [[ -O $dir ]] || die "$dir belongs to another user: set DIALECT_MYSQL_DIR to a folder of your own."
  chmod 755 "$dir"

  # Two calls at once must not install or start two servers. mysqld must not inherit the lock: see 9>&- below.
  if command -v flock >/dev/null; then
    exec 9>"$dir/lock"
    flock 9
  fi

  if server_pid >/dev/null; then
    [[ $(server_port) == "$port" ]] ||
      die "the server in $dir already runs on port $(server_port): stop it first, or set another DIALECT_MYSQL_DIR."
  else
    port_taken "$port" && die "port $port is taken by another program: set DIALECT_MYSQL_PORT to a free one."
    [[ $kind == host ]] || install_server
    initialise
    if [[ ! -s $dir/password ]]; then
      (umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/password")
    fi
    printf "ALTER USER 'root'@'localhost' IDENTIFIED BY '%s';\n" "$(cat "$dir/password")" >"$outer/init.sql"
    chmod 600 "$outer/init.sql"
    owned_by_server "$outer/init.sql"
    echo "$port" >"$outer/port"
    rm -f "$outer/mysqld.pid"
    # Every program that asks for it gets a connection: parallel test workers each hold a pool. Without its log writer
    # threads a commit is as durable and takes a quarter less CPU, as long as few connections commit at once.
    local -a more
    read -ra more <<<"${DIALECT_MYSQL_OPTIONS:-}"
    mysqld_run --daemonize --datadir="$inner/data" --log-error="$inner/mysqld.log" --pid-file="$inner/mysqld.pid" \
      --port="$port" --bind-address=127.0.0.1 --socket="$inner/mysqld.sock" --mysqlx=OFF --secure-file-priv= \
      --max-connections=300 --binlog-expire-logs-seconds=3600 --innodb-log-writer-threads=OFF \
      --init-file="$inner/init.sql" "${more[@]}" \
      </dev/null >&2 9>&- || { log_tail; die "mysqld did not start on port $port: the reason is in its log above."; }
  fi

  local tries=0
  until answers "$port"; do
    server_pid >/dev/null || { log_tail; die "mysqld stopped while it was starting: the reason is in its log above."; }
    ((++tries <= 300)) || { log_tail; die "mysqld runs but did not answer on port $port within 60 s."; }
    sleep 0.2
  done
  print_url
}

stop() {
  local pid tries=0
  pid=$(server_pid) || { say "not running"; return; }
  kill -TERM "$pid" || die "process $pid belongs to another user: call this as the user who started it."
  while server_pid >/dev/null; do
    ((++tries <= 300)) || die "mysqld (process $pid) did not stop within 60 s: look at $outer/mysqld.log."
    sleep 0.2
  done
  say "stopped"
}

require_running() {
  server_pid >/dev/null || { say "not running: start it with 'scripts/mysql.sh start'"; exit 3; }
  answers "$(server_port)" || die "mysqld runs but does not answer on port $(server_port): look at $outer/mysqld.log."
}

locate
case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) require_running && say "running on port $(server_port), process $(server_pid)" ;;
  url) require_running && print_url ;;
  *) die "say one of: start, stop, status, url" ;;
esac
