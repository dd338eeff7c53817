#!/bin/sh
# The third-party programs that tests use. Finds them; as root on Debian or Ubuntu installs what is missing; otherwise
# says which tests will not run. Prints the names of what is missing at the end, on one line of standard output (`make`
# hands it to tests/__main__.py in MISSING_PARTS); talks on standard error. With CI=true a missing part is a failure.
set -eu
cd "$(dirname "$0")/.."

# A part is: name, and in the functions below how it is found, its Debian package, what is not tested without it.
parts="curl libcoap mosquitto mosquitto-clients mqtt.js node-coap-client openssl postgresql tinydtls wrk"

found() {
    case $1 in
        postgresql) installed_postgres ;;
        mosquitto) command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ] ;;
        mosquitto-clients) command -v mosquitto_rr >/dev/null 2>&1 ;;
        libcoap) all_of coap-client-openssl coap-client-gnutls coap-server-openssl ;;
        mqtt.js) [ -d "$node_modules/mqtt" ] && command -v node >/dev/null 2>&1 ;;
        node-coap-client) [ -d "$node_modules/node-coap-client" ] && command -v node >/dev/null 2>&1 ;;
        tinydtls) installed_tinydtls ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

package() {
    case $1 in
        libcoap) echo libcoap3-bin ;;
        postgresql) newest_postgres_package ;;
        *) echo "$1" ;;
    esac
}

all_of() {
    for program in "$@"; do
        command -v "$program" >/dev/null 2>&1 || return 1
    done
}

without() {
    case $1 in
        libcoap) echo "CoAP over DTLS as libcoap speaks it; \`make bench\` then has no rival for CoAP" ;;
        mosquitto) echo "nothing; \`make bench\` then has no rival for MQTT" ;;
        mosquitto-clients) echo "MQTT as mosquitto's programs speak it" ;;
        mqtt.js) echo "MQTT as MQTT.js speaks it (needs node and npm)" ;;
        node-coap-client) echo "CoAP over DTLS as a JavaScript client speaks it (needs node and npm)" ;;
        tinydtls) echo "CoAP over DTLS as aiocoap's client speaks it (DTLSSocket; needs autoconf, automake, gcc, make and Python's headers)" ;;
        curl) echo "the walks through the seeds by curl" ;;
        openssl) echo "certificates and handshakes as another implementation sees them" ;;
        wrk) echo "nothing; \`make bench\` then loads the server by a generator in Python, whose cost is near the server's" ;;
        postgresql) echo "everything on an installed PostgreSQL; the wheel's is still tested" ;;
    esac
}

# Node's modules and what is compiled are kept outside the tree, in a cache that every checkout of this user shares.
node_modules=${GATEHOUSE_TEST_NODE_MODULES:-${XDG_CACHE_HOME:-$HOME/.cache}/gatehouse-tests/node_modules}
cache=$(dirname "$node_modules")

# In one call: what an earlier call without --save has brought, a later one removes.
install_node_modules() {
    command -v npm >/dev/null 2>&1 && command -v node >/dev/null 2>&1 || return 0
    mkdir -p "$cache" || return 0
    npm install --prefix "$cache" --no-audit --no-fund --no-save mqtt@5 node-coap-client@2 >&2 || true
}

# aiocoap speaks DTLS through tinydtls, whose binding exists as source only. It is written for PSKs of 16 bytes, the key
# length of AES-128; Gatehouse's have 32, so that limit is raised, and the room for what is derived from them. The local
# version says so; a binding without it cannot hold the keys.
python=.venv/bin/python
tinydtls=0.2.3
tinydtls_here=$tinydtls+psk32

installed_tinydtls() {
    "$python" -c '
import sys
from importlib.metadata import version
import DTLSSocket
sys.exit(version("DTLSSocket") != sys.argv[1])' "$tinydtls_here" >/dev/null 2>&1
}

pip() {
    "$python" -m pip --quiet --no-input --disable-pip-version-check "$@"
}

install_tinydtls() {
    [ -x "$python" ] || return 0
    install_built_tinydtls 2>/dev/null && return
    all_of autoconf autoreconf automake gcc make tar || return 0
    echo "Building tinydtls; once, about a minute." >&2
    source=$(mktemp -d)
    {
        pip download --no-deps --no-binary DTLSSocket --dest "$source" "DTLSSocket==$tinydtls" &&
            tar -xzf "$source"/*.tar.gz -C "$source" --strip-components=1 &&
            sed -i -e 's/^#define DTLS_PSK_MAX_KEY_LEN .*/#define DTLS_PSK_MAX_KEY_LEN 32/' \
                -e 's/(2 \* DTLS_MAC_KEY_LENGTH + 2 \* DTLS_KEY_LENGTH/(2 * 32 + 2 * DTLS_KEY_LENGTH/' \
                "$source/DTLSSocket/tinydtls/crypto.h" &&
            sed -i "s/version='$tinydtls'/version='$tinydtls_here'/" "$source/setup.py" &&
            CC=gcc pip wheel --no-deps --wheel-dir "$source/built" "$source" &&
            mkdir -p "$cache/wheels" &&
            mv -f "$source"/built/*.whl "$cache/wheels/" &&
            install_built_tinydtls
    } >&2 || true
    rm -rf "$source"
}

install_built_tinydtls() {
    pip install --no-deps --no-index --find-links "$cache/wheels" "DTLSSocket==$tinydtls_here"
}

python_headers() {  # the package of the interpreter's headers, where they are missing
    "$python" -c 'import os, sys, sysconfig
sys.exit(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null || return 0
    "$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])'
}

# The tests start their own servers, so the programs do; no cluster is needed. psql alone is not enough.
installed_postgres() {
    for bindir in ${PG_BINDIR:+"$PG_BINDIR"} /usr/lib/postgresql/*/bin /usr/pgsql-*/bin "$(dirname "$(command -v postgres || echo /)")"; do
        [ -x "$bindir/postgres" ] && [ -x "$bindir/initdb" ] || continue
        major=$("$bindir/postgres" --version 2>/dev/null | sed 's/^[^0-9]*\([0-9]*\).*/\1/')
        [ "${major:-0}" -ge 15 ] && return 0
    done
    return 1
}

newest_postgres_package() {
    for major in 15 16 17 18; do  # the oldest that we support, where it can be had: the wheel brings the newest
        if apt-cache policy "postgresql-$major" 2>/dev/null | grep -q 'Candidate: [0-9]'; then
            echo "postgresql-$major"
            return
        fi
    done
    echo postgresql
}

missing() {
    for part in $parts; do
        found "$part" || printf '%s ' "$part"
    done
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold "$@" >"$log" 2>&1 ||
        { echo "apt-get $1 failed:" >&2; tail -n 5 "$log" >&2; return 1; }
}

install_missing() {
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    echo "Installing what the tests need: $*" >&2
    apt update || return 0
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        # Installing must not start a database server on this machine: no default cluster, so there is nothing to start.
        mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    fi
    for part in "$@"; do
        case $part in
            mqtt.js | node-coap-client) ;;
            tinydtls)
                headers=$(python_headers)
                [ -z "$headers" ] || apt install --no-install-recommends "$headers" || true
                apt install --no-install-recommends autoconf automake gcc libc6-dev make && install_tinydtls || true
                ;;
            mosquitto) without_starting apt install --no-install-recommends mosquitto || true ;;
            *) apt install --no-install-recommends "$(package "$part")" || true ;;
        esac
    done
}

# Installing a server must not start it, now or when the machine starts: the tests start their own, on ports of their
# own. Debian asks policy-rc.d before it starts a service; one that is there already stays as it is, and is asked.
without_starting() {
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then policy=; else
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f "$log" "$policy"' EXIT
    fi
    status=0
    "$@" || status=$?
    [ -z "$policy" ] || rm -f "$policy"
    trap 'rm -f "$log"' EXIT
    if command -v systemctl >/dev/null 2>&1; then systemctl --quiet disable mosquitto >/dev/null 2>&1 || true; fi
    return $status
}

{ found mqtt.js && found node-coap-client; } || install_node_modules
found tinydtls || install_tinydtls
absent=$(missing)
if [ -n "$absent" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    # shellcheck disable=SC2086  # one word per part
    install_missing $absent
    absent=$(missing)
fi
for part in $absent; do
    echo "*** $part is missing. Not tested without it: $(without "$part")." >&2
done
if [ -n "$absent" ] && [ "${CI:-}" = true ]; then
    echo "*** CI=true: that is a failure." >&2
    exit 1
fi
echo "${absent% }"
