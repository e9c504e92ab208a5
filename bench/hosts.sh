#!/bin/bash
# Several hosts on this machine, for tests of what runs between hosts. Needs root, iproute2 and network namespaces.
#
#   hosts.sh up N [RATE]     N hosts (namespaces pc0.. with 10.77.0.1..) on one switch; RATE such as 1gbit shapes every
#                            link in both directions, "none" (the default) leaves them as fast as they are
#   hosts.sh on I COMMAND..  runs a command on host I
#   hosts.sh down            takes down whatever stands, also the rest of an interrupted run
#
# Shaping is a token bucket without added delay: emulated delay (netem) is missing in many kernels.
set -euo pipefail

namespaces() { ip netns list | awk '$1 ~ /^pc([0-9]+|sw)$/ { print $1 }'; }

shape() { # NAMESPACE DEVICE RATE
  [ "$3" = none ] || ip netns exec "$1" tc qdisc add dev "$2" root tbf rate "$3" burst 256kb latency 50ms
}

up() { # N RATE
  ip netns add pcsw
  ip -n pcsw link add br0 type bridge
  ip -n pcsw link set br0 up
  for ((i = 0; i < $1; i++)); do
    ip netns add "pc$i"
    ip link add "v$i" netns "pc$i" type veth peer name "p$i" netns pcsw
    ip -n pcsw link set "p$i" master br0 up
    ip -n "pc$i" addr add "10.77.0.$((i + 1))/24" dev "v$i"
    ip -n "pc$i" link set "v$i" up
    ip -n "pc$i" link set lo up
    shape "pc$i" "v$i" "$2"
    shape pcsw "p$i" "$2"
  done
}

down() { for name in $(namespaces); do ip netns del "$name"; done; }

case ${1:-} in
  up) [ $# -ge 2 ] || { echo "usage: hosts.sh up N [RATE]" >&2; exit 2; }; up "$2" "${3:-none}" ;;
  down) down ;;
  on) host=pc$2; shift 2; exec ip netns exec "$host" "$@" ;;
  *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
