{{- define "nnunet.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 45 | trimSuffix "-" -}}
{{- end }}

{{- define "nnunet.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "nnunet.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "nnunet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* An image by its digest, else its tag. */ -}}
{{- define "nnunet.image" -}}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}{{ else }}{{ printf "%s:%s" .repository .tag }}{{ end -}}
{{- end }}

{{- define "nnunet.serverImage" -}}
{{- $image := .Values.image -}}
{{- include "nnunet.image" (dict "repository" $image.repository "tag" ($image.tag | default .Chart.AppVersion) "digest" $image.digest) -}}
{{- end }}

{{- define "nnunet.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "nnunet.name" .) }}
{{- end }}

{{- /* The least grace period with which nothing is lost: the preStop hook and the longest request within it, and a margin. */ -}}
{{- define "nnunet.leastGrace" -}}
{{- add .Values.stop.endpointSeconds .Values.server.longestRequestSeconds .Values.stop.marginSeconds -}}
{{- end }}

{{- /* What the server waits for nginx, which sends every answer to its end: the longest request, and a third of the margin. */ -}}
{{- define "nnunet.proxyEndSeconds" -}}
{{- add .Values.server.longestRequestSeconds (div .Values.stop.marginSeconds 3) -}}
{{- end }}

{{- /* What the server has from SIGTERM on: what the hook leaves of the pod's grace period, without a third of the margin, in
     which it lets its workers go, so that clients get answers, before the kubelet kills it. */ -}}
{{- define "nnunet.serverGrace" -}}
{{- $hook := int .Values.stop.endpointSeconds -}}
{{- if .Values.proxy.enabled }}{{ $hook = add $hook (include "nnunet.proxyEndSeconds" .) }}{{ end -}}
{{- sub (sub (include "nnunet.grace" . | int) $hook) (div .Values.stop.marginSeconds 3) -}}
{{- end }}

{{- define "nnunet.grace" -}}
{{- $least := include "nnunet.leastGrace" . | int -}}
{{- $given := .Values.stop.terminationGracePeriodSeconds -}}
{{- if kindIs "invalid" $given }}{{ $least }}
{{- else if lt (int $given) $least -}}
{{- fail (printf "stop.terminationGracePeriodSeconds %d would cut requests: the preStop hook (stop.endpointSeconds %d), the longest request (server.longestRequestSeconds %d) and stop.marginSeconds %d need %d" (int $given) (int .Values.stop.endpointSeconds) (int .Values.server.longestRequestSeconds) (int .Values.stop.marginSeconds) $least) -}}
{{- else }}{{ int $given }}{{ end -}}
{{- end }}

{{- define "nnunet.gibibytes" -}}
{{- if eq .Values.models.store.kind "fetch" }}{{ divf (include "nnunet.fetchBytes" .) 1073741824 }}{{ else }}{{ .Values.models.gibibytes }}{{ end -}}
{{- end }}

{{- /* How long a start may take: by the number of archives and their size. */ -}}
{{- define "nnunet.startupSeconds" -}}
{{- $archives := .Values.models.archives -}}
{{- if eq .Values.models.store.kind "fetch" }}{{ $archives = len .Values.models.store.fetch.archives }}{{ end -}}
{{- addf .Values.startup.baseSeconds (mulf $archives .Values.startup.secondsPerArchive) (mulf (include "nnunet.gibibytes" .) .Values.startup.secondsPerGibibyte) | ceil | int -}}
{{- end }}

{{- /* For so much longer than a server's on its own a new pod's metrics port may not answer: it has an address, and Prometheus
     looks at it, while archives are fetched and TorchServe unpacks them, which it does before it opens its ports. */ -}}
{{- define "nnunet.silentSeconds" -}}
{{- $times := ternary 2 1 (eq .Values.models.store.kind "fetch") -}}
{{- mulf (include "nnunet.gibibytes" .) .Values.startup.secondsPerGibibyte $times | ceil | int -}}
{{- end }}

{{- define "nnunet.fetchBytes" -}}
{{- $bytes := 0 -}}
{{- range .Values.models.store.fetch.archives }}{{ $bytes = add $bytes (int64 .maxBytes) }}{{ end -}}
{{- $bytes -}}
{{- end }}

{{- /* A quantity of Kubernetes, as 2Gi, in bytes. */ -}}
{{- define "nnunet.bytes" -}}
{{- $factors := dict "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $factors (regexFind "[A-Za-z]*$" .) | default 1) | int64 -}}
{{- end }}

{{- /* The series of this release's pods, as a monitor of the Prometheus operator labels them. */ -}}
{{- define "nnunet.series" -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ include "nnunet.name" . }}-[a-z0-9]+-[a-z0-9]+"
{{- end }}

{{- /* Seconds that the work in hand takes at the pace of the last five minutes. A fleet that has done nothing yet is taken to
     have a pace all the same, of its pods: else an idle one would divide by zero, and one that has just got its first case
     by next to nothing. */ -}}
{{- define "nnunet.waitingSeconds" -}}
{{- $series := include "nnunet.series" . -}}
{{- printf "sum(nnunet_passes_waiting{%s}) / clamp_min(sum(rate(nnunet_passes_total{%s}[5m])) or vector(0), scalar(count(count by (pod) (nnunet_passes_waiting{%s}))) * %s)" $series $series $series (toString .Values.autoscaling.floorPassesPerSecond) -}}
{{- end }}

{{- /* What cannot be meant; each sentence says what would be right. */ -}}
{{- define "nnunet.check" -}}
{{- $store := .Values.models.store -}}
{{- if not $store.kind }}{{ fail "where are the archives? models.store.kind: claim (with models.store.claim.name), fetch (with models.store.fetch.archives) or image" }}{{ end -}}
{{- if and (eq $store.kind "claim") (not $store.claim.name) }}{{ fail "models.store.kind is claim: models.store.claim.name is the PersistentVolumeClaim that has the archives" }}{{ end -}}
{{- if eq $store.kind "fetch" -}}
{{- if not $store.fetch.archives }}{{ fail "models.store.kind is fetch: models.store.fetch.archives lists them, each with url, sha256 and maxBytes" }}{{ end -}}
{{- range $number, $archive := $store.fetch.archives -}}
{{- if and $archive.url (not (hasPrefix "https://" $archive.url)) }}{{ fail (printf "models.store.fetch.archives[%d].url: an archive is code, and comes over https only" $number) }}{{ end -}}
{{- if not (or $archive.url $archive.urlFrom) }}{{ fail (printf "models.store.fetch.archives[%d]: url, or urlFrom, says where it is" $number) }}{{ end -}}
{{- if and $archive.url $archive.urlFrom }}{{ fail (printf "models.store.fetch.archives[%d]: url or urlFrom, not both" $number) }}{{ end -}}
{{- if and $archive.urlFrom (not $archive.name) }}{{ fail (printf "models.store.fetch.archives[%d]: name says what the file shall be called, as brain.mar; with urlFrom nobody else knows" $number) }}{{ end -}}
{{- if not (regexMatch "^[0-9a-fA-F]{64}$" (toString $archive.sha256)) }}{{ fail (printf "models.store.fetch.archives[%d].sha256: 64 hexadecimal digits, as sha256sum prints them" $number) }}{{ end -}}
{{- if not $archive.maxBytes }}{{ fail (printf "models.store.fetch.archives[%d].maxBytes: the largest file that is taken" $number) }}{{ end -}}
{{- end -}}
{{- $room := include "nnunet.bytes" (toString .Values.volumes.tmp.sizeLimit) | int64 -}}
{{- if lt $room (include "nnunet.fetchBytes" . | int64) }}{{ fail (printf "volumes.tmp.sizeLimit %s cannot hold what models.store.fetch.archives may have unpacked (%s bytes, their maxBytes): a pod would be evicted" (toString .Values.volumes.tmp.sizeLimit) (include "nnunet.fetchBytes" .)) }}{{ end -}}
{{- end -}}
{{- if and .Values.proxy.enabled (not .Values.proxy.tls.secretName) }}{{ fail "proxy.enabled: proxy.tls.secretName is a Secret of type kubernetes.io/tls; tokens and images do not travel in the clear" }}{{ end -}}
{{- if and (ne .Values.service.type "ClusterIP") (not .Values.proxy.enabled) }}{{ fail (printf "service.type %s lets whoever reaches the node send images: proxy.enabled asks who they are, or leave it ClusterIP" .Values.service.type) }}{{ end -}}
{{- if and .Values.management.enabled .Values.proxy.enabled .Values.proxy.tokens.secretName }}{{ fail "management.enabled has TorchServe ask every client for its own token, in the header that proxy.tokens takes: choose one of them" }}{{ end -}}
{{- if and .Values.metrics.monitor (not .Values.metrics.enabled) }}{{ fail "metrics.monitor: metrics.enabled opens the port that it looks at" }}{{ end -}}
{{- if and .Values.metrics.rules.enabled (not (and .Values.metrics.enabled .Values.metrics.monitor)) }}{{ fail "metrics.rules.enabled: metrics.enabled and metrics.monitor (pod or service) make the series that the rules are about; their labels are the operator's" }}{{ end -}}
{{- if and (eq .Values.autoscaling.kind "hpa") (not .Values.metrics.rules.enabled) }}{{ fail "autoscaling.kind hpa: metrics.rules.enabled makes nnunet_waiting_seconds, which a metrics adapter must hand on (docs/kubernetes.md)" }}{{ end -}}
{{- if and .Values.autoscaling.kind (not .Values.metrics.enabled) }}{{ fail "autoscaling.kind: metrics.enabled, or there is nothing to scale on" }}{{ end -}}
{{- $ports := list 8080 8083 7070 7071 (ternary (int .Values.metrics.port) 8082 .Values.metrics.enabled) (ternary (int .Values.management.port) 8081 .Values.management.enabled) -}}
{{- if .Values.proxy.enabled }}{{ $ports = append $ports (int .Values.proxy.port) }}{{ end -}}
{{- if ne (len (uniq $ports)) (len $ports) }}{{ fail (printf "proxy.port, metrics.port and management.port must be other numbers than each other and than 8080, 8083, 7070 and 7071, which a pod has already; got %v" (slice $ports 4)) }}{{ end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}{{ fail "autoscaling.minReplicas is above maxReplicas" }}{{ end -}}
{{- if and (eq (toString .Values.rollout.maxSurge) "0") (eq (toString .Values.rollout.maxUnavailable) "0") }}{{ fail "rollout: maxSurge or maxUnavailable must be above 0, or no pod can ever be replaced" }}{{ end -}}
{{- end }}

{{- /* deploy/nginx.conf with what differs here. Each line that is looked for must be there once. */ -}}
{{- define "nnunet.nginx" -}}
{{- $text := .Files.Get "files/nginx.conf" -}}
{{- $body := mul (add (.Values.server.bodyLimitMiB | default 512) 1) 1048576 -}}
{{- /* A request may wait in TorchServe's queue, whose length is twice the workers unless values say otherwise. */ -}}
{{- $workers := .Values.server.workers | default (ternary 8 4 .Values.gpu.enabled) -}}
{{- $queue := .Values.server.queue | default (mul 2 $workers) -}}
{{- $wait := add (mul (add 1 (ceil (divf $queue $workers) | int)) .Values.server.longestRequestSeconds) 60 -}}
{{- /* nginx would start a process for each core of the node, whatever the container's limits. */ -}}
{{- $swaps := list
  (list "worker_processes auto;" "worker_processes 2;")
  (list "listen 127.0.0.1:8443;" "# listen: below")
  (list "# tls: " "")
  (list "listen 8443 ssl;" (printf "listen %d ssl;" (int .Values.proxy.port)))
  (list "client_max_body_size 537919488;" (printf "client_max_body_size %d;" $body))
  (list "limit_conn per_address 16;" (printf "limit_conn per_address %d;" (int .Values.proxy.perAddress)))
  (list "proxy_read_timeout 1260s;" (printf "proxy_read_timeout %ds;" $wait)) -}}
{{- if .Values.proxy.tokens.secretName }}{{ $swaps = append $swaps (list "# auth: " "") }}{{ end -}}
{{- range $swaps -}}
{{- if not (contains (first .) $text) }}{{ fail (printf "files/nginx.conf has no %q any more: it and templates/_helpers.tpl belong together" (first .)) }}{{ end -}}
{{- $text = replace (first .) (last .) $text -}}
{{- end -}}
{{- $text -}}
{{- end }}

{{- define "nnunet.config" -}}
{{ .Files.Get "files/config.properties" }}
# Of the chart's server.settings: the last of two lines counts.
{{ range $key, $value := .Values.server.settings }}{{ $key }}={{ $value }}
{{ end }}
{{- end }}

{{- define "nnunet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* Quantities as text: a Kubernetes of 1.20 takes no numbers where helm 4 has the API server apply. */ -}}
{{- define "nnunet.resources" -}}
{{- range $kind, $quantities := . }}
{{- if kindIs "map" $quantities }}
{{ $kind }}:
  {{- range $name, $quantity := $quantities }}
  {{- if not (kindIs "invalid" $quantity) }}
  {{ $name }}: {{ $quantity | toString | quote }}
  {{- end }}
  {{- end }}
{{- else if not (kindIs "invalid" $quantities) }}
{{ $kind }}: {{ toJson $quantities }}
{{- end }}
{{- end }}
{{- end }}
