--- moonrabbit doctor: connects step by step and says what is wrong where.

local app = require "moonrabbit.cli.doctor.app"
local cluster = require "moonrabbit.cli.doctor.cluster"
local exit = require "moonrabbit.cli.exit"
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
  reach.uri, reach.dns, reach.tcp, reach.tls, reach.protocol, session.login, session.permissions, session.versions,
  session.tuned, session.round_trip,
}

local function examine(report, patient, args)
  for _, step in ipairs(order) do
    if not step(report, patient, args) then return end
  end
end

local function name_of(place)
  return (place.site and place.site .. " " or "") .. require("moonrabbit.uri").endpoint(place.parsed)
end

-- One place of an app: the patient that it makes. `needs`: whether to look at what the app needs, too.
local function examine_place(report, patient, place, needs, args)
  local one = {
    app = patient.app, source = patient.source, options = place.options, parsed = place.parsed, site = place.site,
  }
  examine(report, one, args)
  if not one.conn then return one end
  if needs then app.look(report, one, args) end
  one.conn:close(one.timeout)
  return one
end

-- What the app needs is looked at once in each cluster, where one gets in first.
local function examine_app(report, patient, args)
  local places, looked, shut, met = patient.places, {}, {}, nil
  for i, place in ipairs(places) do
    local name, site = name_of(place), place.site or "the only one"
    if #places > 1 then report:about(name, ("%d of %d: %s"):format(i, #places, name)) end
    local one = examine_place(report, patient, place, not looked[site], args)
    looked[site] = looked[site] or one.conn ~= nil
    if not one.conn then shut[#shut + 1] = name end
    if not met or one.conn and not met.conn then met = one end
  end
  report:about(nil)
  patient.parsed, patient.timeout = met.parsed, met.timeout
  if #shut > 0 and #places > 1 then
    report:fail("endpoints", exit.unreachable, ("%d of %d cannot be used: %s"):format(#shut, #places,
      table.concat(shut, ", ")), "the app, failing over, would not get in there from here", { unusable = shut })
  elseif #places > 1 then
    report:pass("endpoints", ("all %d can be used"):format(#places), { endpoints = #places })
  end
end

function doctor.run(args)
  local report, patient = reports.new(), {}
  if not args.app then
    examine(report, patient, args)
    if patient.conn then patient.conn:close(patient.timeout) end
  elseif app.load(report, patient, args) then
    examine_app(report, patient, args)
  end
  if args.cluster and patient.parsed then cluster.look(report, patient, args) end
  return report:finish()
end

return doctor
