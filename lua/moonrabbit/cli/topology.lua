--- moonrabbit topology plan|apply

local api = require "moonrabbit.cli.api"
local app_connection = require "moonrabbit.cli.app_connection"
local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local script = require "moonrabbit.cli.script"

local topology = {
  summary = "Compare what an app declares with the broker, and declare what is missing.",
  epilog = "Nothing is ever deleted. Where something is there with other properties, apply changes nothing at all. "
    .. "Without --management bindings cannot be looked up, and are made anew, which does no harm.",
}

local function add(command, name, summary)
  local sub = command:command(name) :summary(summary) :description(summary)
  script.build(sub)
  api.add_choice(sub, "to see bindings")
  return sub
end

function topology.build(command, common)
  command:require_command(true)
  local plan = add(command, "plan", "Say what is missing and what differs; the exit code is 0.")
  plan:flag "--check" :description "The exit code is 1 when something is missing or differs."
  common(plan)
  common((add(command, "apply", "Declare what is missing.")))
end

local marks = { same = "=", missing = "+", differs = "!", refused = "!", unknown = "?" }

local function report(explain, list)
  local count = { same = 0, missing = 0, differs = 0, refused = 0, unknown = 0 }
  local lines = {}
  for i, each in ipairs(list) do
    count[each.state] = count[each.state] + 1
    lines[i] = { state = each.state, entity = explain.step(each.step), text = each.text }
    if not output.is_json() and not output.is_quiet() then
      output.write(marks[each.state], " ", lines[i].entity, "\n")
      if each.text then output.write("    ", output.redact(each.text), "\n") end
    end
  end
  return count, lines
end

local function summary(count)
  return ("%d as declared, %d missing, %d different, %d unknown"):format(count.same, count.missing,
    count.differs + count.refused, count.unknown)
end

-- Policies and limits that would disturb retries. Without the management API only the script's own limits are known.
local function warn(app, client, vhost)
  local queues, err
  if client then queues, err = client:queues { vhost = vhost } end
  if err then return nil, err end
  local list = require("moonrabbit.life.warnings").of(app, queues)
  for _, text in ipairs(list) do output.complain("warning: " .. text) end
  return list
end

local function apply(conn, list)
  local channel, err = conn:channel()
  if not channel then return nil, err end
  local steps = {}
  for _, each in ipairs(list) do
    if each.state ~= "same" and not (each.state == "unknown" and each.text) then steps[#steps + 1] = each.step end
  end
  local ok
  ok, err = require("moonrabbit.app.topology").declare(channel, steps)
  return ok, err
end

local function run(app, conn, client, args)
  local explain, compare = require "moonrabbit.life.explain", require "moonrabbit.life.compare"
  local server = conn:server()
  local steps = explain.topology(app, server and server.version)
  local list, err = compare.run(conn, steps, client, conn._target.vhost)
  if not list then return nil, err end
  local warned
  warned, err = warn(app, client, conn._target.vhost)
  if not warned then return nil, err end
  local count, lines = report(explain, list)
  local different = count.differs + count.refused
  if args.plan then
    output.result({ app = app.name, entities = lines, missing = count.missing, different = different,
      warnings = warned }, summary(count))
    return args.check and count.missing + different > 0 and exit.failed or exit.ok
  end
  if different > 0 then
    output.complain(summary(count) .. ": nothing was changed")
    return exit.failed
  end
  local ok
  ok, err = apply(conn, list)
  if not ok then return nil, err end
  output.result({ app = app.name, declared = count.missing }, ("%s: declared"):format(summary(count)))
  return exit.ok
end

local function wrong(problem)
  output.complain(problem)
  return exit.usage
end

function topology.run(args)
  local app, problem = script.load_to_connect(args)
  if not app then return wrong(problem) end
  local given, client
  given, problem = app_connection.options(app, args)
  if not given then return wrong(problem) end
  client, problem = api.of_app(args, given)
  if client == nil then return wrong(problem) end
  return connect.with_channel(args, {}, function(_, conn) return run(app, conn, client, args) end, nil, given)
end

return topology
