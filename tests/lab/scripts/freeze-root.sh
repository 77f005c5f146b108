# Copies the busy, frozen root to /dev/vdb. The journal of the writer goes to the shared folder.
set -euo pipefail
writer=/dev/shm/live-writer
cp "$SHARE/live-writer" $writer

mkfifo /dev/shm/announced
$writer run /var/live --journal /dev/shm/journal --light --orphans --budget 8 >/dev/shm/announced &
running=$!
read -r line </dev/shm/announced
[ "$line" = running ]
sleep 5

# Everything that runs while the root is frozen is in memory by then.
$writer clock >/dev/null
dd if=/dev/vda of=/dev/null bs=1M count=1 iflag=direct status=none
fsfreeze --freeze /
begin=$($writer clock)
dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct status=none && copied=0 || copied=$?
end=$($writer clock)
fsfreeze --unfreeze /
[ "$copied" = 0 ]

sleep 2
kill -TERM $running
wait $running
echo "frozen for $(((end - begin) / 1000000)) ms"
cp /dev/shm/journal "$SHARE/journal"
echo "$begin $end" >"$SHARE/window"
