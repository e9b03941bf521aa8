#!/bin/sh
# Check icestream.json against Grafana's own TypeScript types (npm @grafana/schema); needs npm and the network once.
# Optional: the tests check structure, names and queries without it.
#
#     sh ops/grafana/check_types.sh [FOLDER_FOR_NODE_MODULES]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
if [ ! -d "$folder/node_modules/@grafana/schema" ]; then
    npm install --silent --no-audit --no-fund --prefix "$folder" @grafana/schema@13.2.3 typescript@5.9
fi
# JSON holds an enum's value as a string; `${Enum}` is the union of those strings.
{
    cat <<'TYPES'
import type { AnnotationQuery, Dashboard } from '@grafana/schema';
type Json<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Json<T[K]> } : T;
// The schema knows no data source: what a target holds beyond refId is Prometheus' own.
type Annotation = Omit<Json<AnnotationQuery>, 'target'> & { target: { refId: string; expr: string } };
type Ours = Omit<Json<Dashboard>, 'annotations'> & { annotations: { list: Annotation[] } };
export const dashboard: Ours =
TYPES
    cat "$here/icestream.json"
    echo ";"
} > "$folder/dashboard.ts"
cd "$folder"
./node_modules/.bin/tsc --noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler --target es2022 dashboard.ts
echo "icestream.json has the types of Grafana's schema"
