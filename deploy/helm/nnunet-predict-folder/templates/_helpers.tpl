{{- define "folder.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "folder.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "folder.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "folder.check" -}}
{{- if not .Values.servers }}{{ fail "servers: which server? As http://RELEASE-nnunet-torchserve:8080" }}{{ end -}}
{{- if not .Values.model }}{{ fail "model: the model's name on the server (nnunet-torchserve list)" }}{{ end -}}
{{- if not (and .Values.images.claim .Values.predictions.claim) }}{{ fail "images.claim and predictions.claim: the PersistentVolumeClaims of the folders" }}{{ end -}}
{{- end }}

{{- /* The pod of a part; .part is its number, or what becomes it. */ -}}
{{- define "folder.pod" -}}
{{- /* A pod with two volumes of one claim waits for the second one for ever, in Kubernetes 1.20 at least. */ -}}
{{- $shared := eq .root.Values.images.claim .root.Values.predictions.claim -}}
metadata:
  labels:
    {{- include "folder.selector" .root | nindent 4 }}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- range $key, $value := .root.Values.podSecurityContext }}
    {{- if not (kindIs "invalid" $value) }}
    {{ $key }}: {{ toJson $value }}
    {{- end }}
    {{- end }}
  {{- with .root.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .root.Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: predict
      {{- $image := .root.Values.image }}
      image: {{ if $image.digest }}{{ printf "%s@%s" $image.repository $image.digest }}{{ else }}{{ printf "%s:%s" $image.repository ($image.tag | default .root.Chart.AppVersion) }}{{ end }}
      imagePullPolicy: {{ $image.pullPolicy }}
      command: [nnunet-torchserve, predict]
      args:
        {{- range .root.Values.servers }}
        - --server={{ . }}
        {{- end }}
        - --model={{ .root.Values.model }}
        - -i
        - /images/{{ .root.Values.images.path }}
        - -o
        - /predictions/{{ .root.Values.predictions.path }}
        - -num_parts
        - {{ .root.Values.parts | quote }}
        - -part_id
        - {{ .part | quote }}
        # What another try, or a pod that was killed, has predicted is there, whole, and stays.
        - --continue_prediction
        {{- if .root.Values.authorities.configMap }}
        - --verify=/etc/nnunet-torchserve/authorities/{{ .root.Values.authorities.key }}
        {{- end }}
        {{- range .root.Values.arguments }}
        - {{ . | quote }}
        {{- end }}
      env:
        - {name: HOME, value: /tmp}
        {{- if .indexed }}
        - name: PART
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
        {{- end }}
        {{- if .root.Values.token.secret }}
        - name: NNUNET_TORCHSERVE_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .root.Values.token.secret }}
              key: {{ .root.Values.token.key }}
        {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      resources:
        {{- include "folder.resources" .root.Values.resources | trim | nindent 8 }}
      volumeMounts:
        - name: images
          mountPath: /images
          readOnly: true
        - name: {{ $shared | ternary "images" "predictions" }}
          mountPath: /predictions
        - name: tmp
          mountPath: /tmp
        {{- if .root.Values.authorities.configMap }}
        - name: authorities
          mountPath: /etc/nnunet-torchserve/authorities
          readOnly: true
        {{- end }}
  volumes:
    - name: images
      persistentVolumeClaim:
        claimName: {{ .root.Values.images.claim | quote }}
    {{- if not $shared }}
    - name: predictions
      persistentVolumeClaim:
        claimName: {{ .root.Values.predictions.claim | quote }}
    {{- end }}
    # No image or answer lies here.
    - name: tmp
      emptyDir:
        medium: Memory
        sizeLimit: 64Mi
    {{- if .root.Values.authorities.configMap }}
    - name: authorities
      configMap:
        name: {{ .root.Values.authorities.configMap }}
    {{- end }}
{{- end }}

{{- /* Quantities as text: a Kubernetes of 1.20 takes no numbers where helm 4 has the API server apply. */ -}}
{{- define "folder.resources" -}}
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
