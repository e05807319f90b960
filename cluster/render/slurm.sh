
# What follows is the same in all jobs. Slurm runs it on the first node of the allocation.
set -u
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
restarts=${SLURM_RESTART_COUNT:-0} told=0 ray='' driver=''
say() { echo "$(date '+%F %T') $SLURM_JOB_ID: $*"; }

# SIGTERM comes to this shell alone. It is passed on to the run once, which saves and ends; a second one would cut that
# short. Ray goes on meanwhile.
tell() {
  if (( ! told )); then
    told=1
    say 'told to end'
    if [[ -n $driver ]]; then kill -TERM "$driver" 2>/dev/null; fi
  fi
}
trap tell TERM

# On a host with several networks, the address by which others reach it.
address_of() {
  if [[ -n $interface ]]; then
    ip -4 -o address show dev "$interface" | sed -n 's/.* inet \([0-9.]*\).*/\1/p' | head -n 1
  else
    ip -4 -o route get "$(getent ahostsv4 "${hosts[1]:-127.0.0.1}" | sed -n '1s/ .*//p')" |
      sed -n 's/.* src \([0-9.]*\).*/\1/p'
  fi
}
head=$(address_of)
if [[ -z $head ]]; then
  say "error: ${hosts[0]} has no address that other nodes reach: name a network interface by --interface"
  exit 1
fi

# Two ports for each job, below those that the kernel gives out, and free on this host; the others are Ray's to choose.
is_taken() { (exec 3<>"/dev/tcp/$head/$1" || exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + SLURM_JOB_ID % 6000 * 2))
while is_taken "$port" || is_taken "$((port + 1))"; do port=$((port + 2)); done

# A token keeps other users of the hosts out of this Ray; LOCKSTEP_JOB tells a lock of an earlier allocation from others'.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export LOCKSTEP_JOB=slurm-$SLURM_JOB_ID
# Ray is told to end when the run has ended: there is nothing left that it could wait for.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
unset RAY_ADDRESS
if [[ -z ${SLURM_JOB_END_TIME:-} ]] && end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e 2>/dev/null); then
  SLURM_JOB_END_TIME=$(date --date "$end" +%s) || unset SLURM_JOB_END_TIME
fi
if [[ -n ${SLURM_JOB_END_TIME:-} ]]; then export SLURM_JOB_END_TIME; fi

# Words, not a function: signals that are sent to a function in the background do not reach srun.
everywhere=(srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
end() {
  local code=$?
  trap '' TERM
  if [[ -n $ray ]]; then kill -TERM "$ray" 2>/dev/null; wait "$ray" 2>/dev/null; fi
  "${everywhere[@]}" rm -rf "$scratch"
  exit "$code"
}
trap end EXIT

# Each node keeps the address from which it reaches the head.
"${everywhere[@]}" bash -c 'mkdir -m 700 "$0" &&
  ip -4 -o route get "$1" | sed -n "s/.* src \([0-9.]*\).*/\1/p" > "$0/address"' "$scratch" "$head" || exit
print_recipe > "$scratch/recipe.toml"

start_node='
ulimit -Sn "$(ulimit -Hn)"
options=(--block --disable-usage-stats --node-ip-address="$(cat "$1/address")" --num-cpus="$4" --num-gpus="$5")
if [[ $SLURM_NODEID = 0 ]]; then
  options+=(--head --port="$3" --ray-client-server-port="$(($3 + 1))" --include-dashboard=false --temp-dir="$1")
else
  until (exec 3<>"/dev/tcp/$2/$3") 2>/dev/null; do sleep 1; done
  options+=(--address="$2:$3")
fi
# Ray gives up where a node is not up within 30 s, or where somebody else took a port that it had chosen.
told=0
trap told=1 TERM
for _ in 1 2 3; do
  SECONDS=0
  "$0" -m ray.scripts.scripts start "${options[@]}"
  code=$?
  if (( told || SECONDS > 120 )); then break; fi
done
exit "$code"'
"${everywhere[@]}" "${resources[@]}" "${container[@]}" \
  bash -c "$start_node" "$python" "$scratch" "$head" "$port" "$cpus" "$gpus" &
ray=$!

train='
recipe=$1 address=$2 nodes=$3
shift 3
"$0" -m lockstep.cluster.render.joined_nodes "$address" "$nodes" || exit
exec "$0" -m lockstep train "$recipe" --address "$address" "$@"'
if (( restarts )); then resume=(--resume); fi
if (( ! told )); then
  srun --overlap --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" --kill-on-bad-exit=1 "${resources[@]}" \
    "${container[@]}" bash -c "$train" "$python" "$scratch/recipe.toml" "$head:$port" "$nodes" "${resume[@]}" &
  driver=$!
fi

# The job ends with the run, and also where Ray has ended on a node: nothing that has died may hold the allocation.
runs() { kill -0 "$1" 2>/dev/null; }
pause() { sleep "$1" & wait $!; }
while [[ -n $driver ]] && runs "$driver" && runs "$ray"; do pause 1; done
lost=0 code=143
if [[ -n $driver ]] && runs "$driver"; then
  lost=1
  say 'error: Ray has ended on a node, and the run ends with it'
  kill -TERM "$driver"
  for _ in {1..60}; do if runs "$driver"; then pause 1; fi; done
fi
if [[ -n $driver ]] && ! runs "$driver"; then wait "$driver"; code=$?; fi
if (( lost && ! code )); then code=1; fi
# What `lockstep train` ends with where a worker or a node was lost, and where the time was over.
if (( code == 75 || code == 124 )); then lost=1; fi
# A job that was cancelled is told to end, too, and stays so.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if (( code && (told || lost) && restarts < requeues )) && [[ $state = RUNNING ]]; then
  say "the run goes on in another allocation: requeue $((restarts + 1)) of $requeues"
  scontrol requeue "$SLURM_JOB_ID" || say 'error: Slurm took no requeue: submit the script again, rendered with --resume'
fi
say "the run ended with exit code $code"
exit "$code"
