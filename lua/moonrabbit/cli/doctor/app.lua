--- moonrabbit doctor --app: whether an app's script is sound, and whether the broker is as it needs it: what it declares,
-- what its user may do, and what would disturb its retries.

local api = require "moonrabbit.cli.api"
local app_connection = require "moonrabbit.cli.app_connection"
local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local script = require "moonrabbit.cli.script"

local app_steps = {}

--- Adds the options to the command.
function app_steps.build(command)
  command:option "--app" :argname "<script>"
    :description "Connect as this app does, and look whether the broker is as it needs it."
  script.build_env(command)
end

--- The first step: the script, and where it connects to. `patient.places`: moonrabbit.cli.app_connection's.
function app_steps.load(report, patient, args)
  args.script = args.app
  local app, problem = script.load_to_connect(args)
  if not app then return report:fail("app", exit.usage, problem, "moonrabbit run --check says the same") end
  local given, source = app_connection.options(app, args)
  if not given then return report:fail("app", exit.usage, source) end
  patient.places, problem = app_connection.places(given)
  if not patient.places then return report:fail("app", exit.usage, problem) end
  patient.app, patient.options, patient.source = app, given, source
  return report:pass("app", ("%s: the app '%s' is sound, %d consumers"):format(args.script, app.name,
    #app.plan.consumers), { app = app.name })
end

-- ---- What it declares -------------------------------------------------------------------------------

local function must_be_there(step) return step.existing or type(step[3]) == "table" and step[3].passive end

-- What is wrong with a difference, and what to do; nil: nothing.
local function verdict(difference)
  local step, state = difference.step, difference.state
  if state == "differs" and not step.as_is then
    return difference.text, "delete it when it is empty, or let the script say what is there: moonrabbit topology plan"
  elseif state == "refused" then
    return difference.text, "this user may not even look at it"
  elseif state == "missing" and must_be_there(step) then
    return "it is not there, and the app does not declare it", "moonrabbit topology apply, by a user who may declare"
  end
end

local function described(step)
  if step[1] == "queue" or step[1] == "exchange" then return ("%s '%s'"):format(step[1], step[2]) end
  return require("moonrabbit.life.explain").step(step)
end

local function look_at_topology(report, list)
  local count, sound = { same = 0, missing = 0, unknown = 0 }, true
  for _, each in ipairs(list) do
    local problem, advice = verdict(each)
    if problem then
      local code = each.state == "refused" and exit.denied or exit.failed
      sound = report:fail("topology", code, described(each.step) .. ": " .. problem, advice,
        { entity = each.step[2], state = each.state })
    else
      local state = count[each.state] and each.state or "same"
      count[state] = count[state] + 1
    end
  end
  if not sound then return end
  report:pass("topology", ("%d as declared, %d missing (the app declares them), %d that cannot be compared"):format(
    count.same, count.missing, count.unknown), count)
end

-- ---- What its user may do ---------------------------------------------------------------------------

local function names_of(list, right)
  local names = {}
  for _, each in ipairs(list) do
    if each.right == right then names[#names + 1] = each.name == "" and "amq.default" or each.name end
  end
  return names
end

local function look_at_rights(report, patient, list)
  local rights = require "moonrabbit.life.rights"
  local needed = rights.needed(patient.app, list)
  local missing, err = rights.missing(patient.conn, needed)
  if not missing then return report:fail("permissions", connect.exit_code(err), tostring(err)) end
  if #missing == 0 then
    return report:pass("permissions", ("all %d that the app needs (nothing was changed to try them)"):format(#needed))
  end
  local texts, data = {}, {}
  for _, right in ipairs { "configure", "write", "read" } do
    local names = names_of(missing, right)
    if #names > 0 then texts[#texts + 1] = ("%s %s"):format(right, table.concat(names, ", ")) end
    data[right] = #names > 0 and names or nil
  end
  local parsed = patient.parsed
  return report:fail("permissions", exit.denied, "no permission to " .. table.concat(texts, "; to "),
    ("rabbitmqctl set_permissions -p '%s' %s CONFIGURE WRITE READ; without CONFIGURE: moonrabbit topology apply by "
      .. "another user, and ladder = { mode = \"existing\" }"):format(parsed.vhost, parsed.user), data)
end

-- ---- Retries ----------------------------------------------------------------------------------------

local advice_for = {
  stuck = "make room in the consumer's queue; they go home by themselves",
  policy = "rabbitmqctl list_policies: let its pattern leave the ladder out",
  classic = "delete it when it is empty: from RabbitMQ 3.10 on the app declares a quorum queue in its place",
  delivery_limit = "x-delivery-limit in the script, or delivery-limit in a policy",
}

local function in_process(app)
  local names = {}
  for _, consumer in ipairs(app.plan.consumers) do
    if consumer.kind == "stream" or consumer.exclusive then names[#names + 1] = consumer.queue end
  end
  return names
end

local function look_at_retries(report, patient, client)
  local queues, err
  if client then queues, err = client:queues { vhost = patient.parsed.vhost } end
  if err then
    return report:fail("retries", connect.exit_code(err, true), "the management API: " .. tostring(err),
      "the user needs the tag 'monitoring', and the broker the plugin rabbitmq_management")
  end
  local problems = require("moonrabbit.life.warnings").problems(patient.app, queues)
  for _, problem in ipairs(problems) do
    report:fail("retries", exit.failed, problem.text, advice_for[problem.problem],
      { queue = problem.queue, problem = problem.problem, messages = problem.messages })
  end
  if #problems > 0 then return end
  local text = client and "nothing disturbs them"
    or "as far as the script tells nothing disturbs them (--management: more)"
  local names = in_process(patient.app)
  if #names > 0 then
    text = text .. "; in the process, for no ladder can bring a copy home: " .. table.concat(names, ", ")
  end
  return report:pass("retries", text, { management = client and true or false })
end

--- The last steps, with a connection. An API that is named is that of the primary site.
function app_steps.look(report, patient, args)
  local client, problem
  if patient.site ~= "standby" then
    client, problem = api.of_app(args, patient.options)
    if client == nil then return report:fail("management", exit.usage, problem) end
  end
  local server = patient.conn:server()
  local steps = require("moonrabbit.life.explain").topology(patient.app, server and server.version)
  local list, err = require("moonrabbit.life.compare").run(patient.conn, steps, client, patient.parsed.vhost)
  if not list then return report:fail("topology", connect.exit_code(err, true), tostring(err)) end
  look_at_topology(report, list)
  look_at_rights(report, patient, list)
  look_at_retries(report, patient, client)
end

return app_steps
