--- moonrabbit doctor: connects step by step and says what is wrong where.

local app = require "moonrabbit.cli.doctor.app"
local cluster = require "moonrabbit.cli.doctor.cluster"
local reach = require "moonrabbit.cli.doctor.reach"
local reports = require "moonrabbit.cli.doctor.report"
local session = require "moonrabbit.cli.doctor.session"

local doctor = {
  summary = "Connect step by step, and say what is wrong where and what to do.",
  epilog = "Looks at the URL, DNS, TCP, TLS, the protocol, the login, the vhost, permissions (with a temporary "
    .. "exclusive queue), versions and the round trip; with --app at what an app needs, with --cluster at the other "
    .. "nodes too. Changes nothing on the broker.",
}

function doctor.build(command, common)
  command:option "--rounds" :argname "<n>" :default "11" :description "How many round trips are timed."
    :convert(require "moonrabbit.cli.values".integer(1, 10000))
  app.build(command)
  cluster.build(command)
  common(command)
end

-- From below: a step that fails ends the examination, unless it says otherwise.
local order = {
  app.load, reach.uri, reach.dns, reach.tcp, reach.tls, reach.protocol, session.login, session.permissions,
  session.versions, session.tuned, session.round_trip,
}

function doctor.run(args)
  local report, patient = reports.new(), {}
  for _, step in ipairs(order) do
    if not step(report, patient, args) then break end
  end
  if patient.app and patient.conn then app.look(report, patient, args) end
  if patient.conn then patient.conn:close(patient.timeout) end
  if args.cluster and patient.parsed then cluster.look(report, patient, args) end
  return report:finish()
end

return doctor
