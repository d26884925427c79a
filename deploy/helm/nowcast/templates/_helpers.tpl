{{- define "nowcast.name" -}}
{{- if eq .Release.Name "nowcast" }}nowcast{{ else }}{{ printf "%s-nowcast" .Release.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "nowcast.labels" -}}
app.kubernetes.io/name: nowcast
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "nowcast.secret" -}}
{{- if .Values.keys.existingSecret }}{{ .Values.keys.existingSecret }}{{ else if .Values.keys.hashes }}{{ include "nowcast.name" . }}-keys{{ end }}
{{- end }}
