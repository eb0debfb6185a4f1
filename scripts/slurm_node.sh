#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests and to try cluster=slurm: start, stop, status. As root, on Debian.
#
# Two partitions: "low" (the default one), whose jobs are sent away and queued again for those of "high". The node has
# more CPUs than the machine, so that several small jobs run at a time. State and logs lie in $SLURM_NODE_DIR.
set -euo pipefail

dir=${SLURM_NODE_DIR:-/tmp/slurm-node}
conf=/etc/slurm/slurm.conf
mark="# Written by slurm_node.sh: a node for tests; 'slurm_node.sh stop' removes this file."

fail() { echo "slurm_node.sh: $1" >&2; exit 1; }

install_packages() {
    local name missing=
    for name in slurmctld slurmd sbatch munged; do command -v "$name" >/dev/null || missing=$name; done
    [[ $missing ]] || return 0
    command -v apt-get >/dev/null || fail "$missing is not there, and neither is apt-get"
    echo "installing slurm-wlm and munge ..."
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

is_ours() { [[ -e $conf && $(head -n 1 "$conf") == "$mark" ]]; }

is_up() { [[ $(timeout 20 sinfo --noheader --format=%T 2>/dev/null | sort -u) =~ ^(idle|mixed|allocated|completing)$ ]]; }

runs() { [[ -s $dir/$1.pid ]] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

write_conf() {
    local host=$1
    mkdir -p "$dir"/{state,spool} /etc/slurm
    cat >"$conf" <<CONF
$mark
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for as long as credentials are good.
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=10
MinJobAge=300
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000
PartitionName=low Nodes=$host Default=YES PriorityTier=1 MaxTime=1-00:00:00 DefaultTime=1:00:00 GraceTime=10
PartitionName=high Nodes=$host PriorityTier=9 MaxTime=1-00:00:00 DefaultTime=1:00:00 PreemptMode=OFF
CONF
}

start_munge() {
    if munge --no-input 2>/dev/null | unmunge >/dev/null 2>&1; then return; fi
    [[ -s /etc/munge/munge.key ]] || runuser -u munge -- /usr/sbin/mungekey --create
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- /usr/sbin/munged
}

start() {
    [[ $(id -u) == 0 ]] || fail "only root can start the daemons"
    if [[ -e $conf ]] && ! is_ours; then fail "$conf belongs to another cluster; it is left as it is"; fi
    if is_ours && is_up; then status; return; fi
    install_packages
    local host
    host=$(hostname -s)
    getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
    write_conf "$host"
    start_munge
    runs slurmctld || slurmctld -i
    runs slurmd || slurmd
    for _ in $(seq 60); do
        if is_up; then status; return; fi
        scontrol update "NodeName=$host" State=RESUME 2>/dev/null || true
        sleep 1
    done
    tail -n 20 "$dir"/slurm*.log >&2
    fail "the node did not come up within a minute; its logs are in $dir"
}

stop() {
    is_ours || { echo "no node of slurm_node.sh is here"; return; }
    if is_up; then
        scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 60); do [[ -n $(squeue --noheader) ]] || break; sleep 1; done  # KillWait, and then some
    fi
    for name in slurmd slurmctld; do
        if runs "$name"; then
            kill "$(cat "$dir/$name.pid")"
            for _ in $(seq 100); do runs "$name" || break; sleep 0.1; done
        fi
    done
    rm -rf "$conf" "$dir"
    echo "the node is stopped"
}

status() {
    is_ours || fail "no node of slurm_node.sh is here"
    is_up || fail "the node is not up; its logs are in $dir"
    sinfo
}

case ${1:-} in
    start | stop | status) "$1" ;;
    *) fail "expected start, stop or status" ;;
esac
