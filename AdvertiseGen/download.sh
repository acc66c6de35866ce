#!/usr/bin/env bash
# Fetch ADGEN's train.json and dev.json into this folder. Nothing here changes unless everything arrived whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ADGEN_URL=${ADGEN_URL:-"https://cloud.tsinghua.edu.cn/f/b3f119a008264b1cabd1/?dl=1"}  # AdvertiseGen.tar.gz
ADGEN_DEV_SHA256=${ADGEN_DEV_SHA256:-96b63cfd9fd0faca122a5747597f46ff835f19d9b1d3634f4b71f8a5f9487cc1}  # of dev.json

ulimit -f 4194304 2> /dev/null || true  # KiB: nothing that is fetched or unpacked may fill the disk

fail() {
    echo "download.sh: $1" >&2
    exit 1
}

# Beside the target, so that the last step is a rename within one file system.
folder=$(mktemp -d ./.download.XXXXXX)
trap 'rm -rf "$folder"' EXIT
archive=$folder/AdvertiseGen.tar.gz

echo "Fetching $ADGEN_URL"
if command -v curl > /dev/null; then
    curl --fail --location --silent --show-error --retry 2 --output "$archive" "$ADGEN_URL" \
        || fail "could not fetch $ADGEN_URL; set ADGEN_URL to a mirror, or see AdvertiseGen/README.md for other sources"
elif command -v wget > /dev/null; then
    wget --quiet --tries=3 --output-document="$archive" "$ADGEN_URL" \
        || fail "could not fetch $ADGEN_URL; set ADGEN_URL to a mirror, or see AdvertiseGen/README.md for other sources"
else
    fail "needs curl or wget; install one of them"
fi

broken="what $ADGEN_URL sent is not a whole .tar.gz archive; run this again, or set ADGEN_URL to a mirror"
strange="the archive holds more than the two files AdvertiseGen/train.json and AdvertiseGen/dev.json"
# Nobody knows who packed the archive: both listings are read before anything is unpacked, and of a file its content
# alone, so that no link, device, permission or other path of it gets onto this disk.
listing=$(LC_ALL=C tar -tvzf "$archive" 2> /dev/null) || fail "$broken"
names=$(LC_ALL=C tar -tzf "$archive" 2> /dev/null) || fail "$broken"
while read -r mode _; do
    case $mode in
        d*) ;;
        -[r-][w-][x-][r-][w-][x-][r-][w-][x-]*) ;;
        *) fail "$strange (one of mode $mode); check ADGEN_URL" ;;
    esac
done <<< "$listing"
seen=" "
while IFS= read -r name; do
    case $name in
        AdvertiseGen/) ;;
        AdvertiseGen/train.json | AdvertiseGen/dev.json)
            [ "${seen/" $name "/}" = "$seen" ] || fail "$strange ($name twice); check ADGEN_URL" ;;
        *) fail "$strange (${name:0:100}); check ADGEN_URL" ;;
    esac
    seen+="$name "
done <<< "$names"
mkdir "$folder/AdvertiseGen"
for name in train.json dev.json; do
    [ "${seen/" AdvertiseGen/$name "/}" != "$seen" ] || fail "the archive holds no AdvertiseGen/$name; check ADGEN_URL"
    tar -xzOf "$archive" "AdvertiseGen/$name" > "$folder/AdvertiseGen/$name" 2> /dev/null || fail "$broken"
    [ -s "$folder/AdvertiseGen/$name" ] || fail "AdvertiseGen/$name in the archive is empty; check ADGEN_URL"
done

if command -v sha256sum > /dev/null; then
    checksum=$(sha256sum "$folder/AdvertiseGen/dev.json")
else
    checksum=$(shasum -a 256 "$folder/AdvertiseGen/dev.json")  # macOS
fi
[ "${checksum%% *}" = "$ADGEN_DEV_SHA256" ] \
    || fail "dev.json has sha256 ${checksum%% *}, expected $ADGEN_DEV_SHA256; the source is not the official ADGEN"

mv -f "$folder/AdvertiseGen/train.json" train.json
mv -f "$folder/AdvertiseGen/dev.json" dev.json
echo "AdvertiseGen/train.json: $(wc -l < train.json) rows, AdvertiseGen/dev.json: $(wc -l < dev.json) rows"
