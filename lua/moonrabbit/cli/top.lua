--- moonrabbit top

local api = require "moonrabbit.cli.api"
local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local figures = require "moonrabbit.cli.top.figures"
local live = require "moonrabbit.cli.top.live"
local output = require "moonrabbit.cli.output"
local plain = require "moonrabbit.cli.top.plain"
local sources = require "moonrabbit.cli.top.sources"
local terminal = require "moonrabbit.cli.top.terminal"
local watched = require "moonrabbit.cli.top.watched"

local top = {
  summary = "Watch queues live: rates, latencies, in flight, retries, dead letters.",
  epilog = "Joins the metrics of running apps (moonrabbit run --metrics, mr.metrics.serve) with the queues of the "
    .. "management API. What is away is said, and asked again. On no terminal it writes a table every interval. "
    .. "Keys: q ends, s sorts by the next column, r turns the order.",
}

local function interval(text)
  local n = tonumber(text)
  if not n or not (n >= 0.1 and n <= 3600) then return nil, ("'%s' is no number from 0.1 to 3600"):format(text) end
  return n
end

local function sort_key(text)
  if figures.sort_keys[text] then return text end
  return nil, ("there is no column '%s' to sort by: %s"):format(text, table.concat(figures.sort_order, ", "))
end

function top.build(command, common)
  command:option "--metrics" :argname "<url>" :count "*" :convert(sources.address)
    :description("Where an app serves its metrics: http://host:port; may be repeated, and is added up. By default "
      .. watched.USUAL .. ".")
  api.add_option(command)
  command:flag "--no-management" :description "Do not ask the management API."
  command:option "--interval" :argname "<seconds>" :convert(interval) :default "2" :description "Between two looks (2)."
  command:flag "--once" :description "Look twice, an interval apart, write what was seen, and end."
  command:option "--sort" :argname "<column>" :convert(sort_key) :default "in"
    :description("One of " .. table.concat(figures.sort_order, ", ") .. ".")
  command:flag "--reverse" :description "The other way round."
  command:option "--queue" :argname "<text>" :description "Only queues whose names hold this."
  common(command)
end

function top.run(args)
  local runtime = require "moonrabbit.runtime.native"
  local options, problem = credentials.resolve(args)
  if not options then
    output.complain(problem)
    return exit.usage
  end
  local self
  self, problem = watched.new(args, runtime)
  if not self then
    output.complain(problem)
    return exit.usage
  end
  local function stop(code)
    self.code = self.code or code
    self.wake:broadcast()
  end
  local off = connect.on_stop(stop)
  runtime.signal("HUP", function() stop(exit.terminated) end)
  local way = args.once and plain.once or not output.is_json() and terminal.is_stdout() and live.run
    or plain.again_and_again
  local code = way(self)
  runtime.signal("HUP", nil)
  off()
  return code
end

return top
