# Runs on the copy that freeze-root.sh made, as the root: is it what the root was at that instant?
set -euo pipefail
echo "root: $(findmnt --noheadings --output FSTYPE /)"
read -r begin end <"$SHARE/window"
cp "$SHARE/live-writer" /dev/shm/
/dev/shm/live-writer check /var/live --journal "$SHARE/journal" \
    --frozen-begin "$begin" --frozen-end "$end" --exact
[ -z "$(ls /var/live/orphans)" ] || echo "an orphan was caught between its making and its removal"
# And it is writable and sound.
echo more >/var/live/more
sync
