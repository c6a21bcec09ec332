--- moonrabbit explain

local exit = require "moonrabbit.cli.exit"
local options = require "moonrabbit.options"
local output = require "moonrabbit.cli.output"
local script = require "moonrabbit.cli.script"
local values = require "moonrabbit.cli.values"

local command = {
  summary = "Say what an app would declare and do with a message, without a broker.",
  epilog = "Conditions of the script are asked about the message; handlers do not run.",
}

function command.build(parser, common)
  script.build(parser)
  parser:option "-k --key" :argname "<key>" :convert(values.short) :default "" :description "Routing key."
  parser:option "-e --exchange" :argname "<name>" :convert(values.short)
    :description "Where it is published; without it every consumer is asked."
  parser:option "-H --header" :argname "<name=value>" :count "*" :convert(values.header)
    :description "name=value, or name:=JSON; may be repeated."
  parser:option "--property" :argname "<name=value>" :count "*" :convert(values.header)
    :description "Such as content_type=text/plain; may be repeated."
  parser:option "--body" :argname "<body>" :default "" :description "Body."
  common(parser)
end

local function route_lines(explain, consumer, message)
  local lines, list = {}, {}
  for _, case in ipairs(explain.route(consumer, message)) do
    list[#list + 1] = case
    lines[#lines + 1] = case.percent == 100 and case.text or ("%g %% of them: %s"):format(case.percent, case.text)
  end
  return lines, list
end

local function show(text) output.write(text, "\n") end

local function why_unknown(exchanges, name)
  if exchanges[name] then return ("the exchange %s is of a kind that cannot be followed here"):format(name) end
  local hint = options.nearest(name, exchanges)
  return ("the exchange %s is not among the app's%s"):format(name, hint and " (did you mean " .. hint .. "?)" or "")
end

local function show_consumer(consumer)
  show("consumer of " .. consumer.queue)
  if consumer.reached == false then
    show "  the message does not reach it"
    return
  end
  for _, line in ipairs(consumer.route_lines) do show("  route    " .. line) end
  for _, line in ipairs(consumer.retries) do show("  retry    " .. line) end
end

function command.run(args)
  local app, problem = script.load(args)
  if not app then
    output.complain(problem)
    return exit.usage
  end
  local explain = require "moonrabbit.life.explain"
  local message = explain.message(args.body, {
    exchange = args.exchange, routing_key = args.key, headers = values.table(args.header),
    properties = values.table(args.property),
  })
  local queues, unknown
  if args.exchange then queues, unknown = explain.queues(app.plan, args.exchange, message) end
  local result = { app = app.name, topology = {}, consumers = {} }
  for i, step in ipairs(explain.topology(app)) do result.topology[i] = explain.step(step) end
  for i, consumer in ipairs(app.plan.consumers) do
    local lines, list = route_lines(explain, consumer, message)
    local reached
    if queues then reached = queues[consumer.queue] or false end
    result.consumers[i] = { queue = consumer.queue, reached = reached, route = list, route_lines = lines,
      retries = explain.retries(app, consumer) }
  end
  if output.is_json() then
    for _, consumer in ipairs(result.consumers) do consumer.route_lines = nil end
    output.result(result, "")
    return exit.ok
  end
  show(("app %s declares"):format(app.name))
  for _, line in ipairs(result.topology) do show("  " .. line) end
  for name in pairs(unknown or {}) do show(why_unknown(app.plan.exchanges, name)) end
  for _, consumer in ipairs(result.consumers) do show_consumer(consumer) end
  return exit.ok
end

return command
