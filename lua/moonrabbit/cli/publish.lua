--- moonrabbit publish

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local progress = require "moonrabbit.cli.progress"
local values = require "moonrabbit.cli.values"

local STOP = 1 -- seconds that SIGINT leaves for the confirms

local publish = {
  summary = "Publish messages and wait for the broker's confirms.",
  description = "Publishes a message given as an argument, the bytes of a file, or a message for every line of "
    .. "standard input, and waits until the broker has every one of them in a queue.",
  epilog = "Without --exchange the routing key is the name of a queue. Messages are persistent and must be "
    .. "routable unless you say otherwise. A line of standard input is text: bytes that may be anything go by --file.",
}

function publish.build(command, common)
  command:argument "body" :args "?"
    :description "The message. Without it and --file: a message for each line of stdin."
  command:group("Route",
    command:option "-e --exchange" :argname "<name>" :convert(values.short) :default "" :show_default(false)
      :description "The exchange; by default the one that routes to the queue named by the key.",
    command:option "-k --routing-key" :argname "<key>" :convert(values.short) :default "" :show_default(false)
      :description "Routing key.",
    command:flag "--no-mandatory" :description "Not an error when no queue takes the message.",
    command:flag "--transient" :description "Not persistent: lost when the broker restarts.")
  command:group("Headers and properties",
    command:option "-H --header" :argname "<name=value>" :count "*" :convert(values.header)
      :description "name=value (a string) or name:=JSON (number, boolean, list, object, null); may be repeated.",
    command:option "--content-type" :argname "<type>" :convert(values.short),
    command:option "--content-encoding" :argname "<name>" :convert(values.short),
    command:option "--priority" :argname "<n>" :convert(values.integer(0, 255)),
    command:option "--correlation-id" :argname "<id>" :convert(values.short),
    command:option "--reply-to" :argname "<queue>" :convert(values.short),
    command:option "--expiration" :argname "<ms>" :convert(values.short)
      :description "Milliseconds until the message is dropped or dead-lettered.",
    command:option "--message-id" :argname "<id>" :convert(values.short),
    command:option "--timestamp" :argname "<unix>" :convert(values.timestamp) :description "Unix seconds, or now.",
    command:option "--type" :argname "<name>" :convert(values.short),
    command:option "--user-id" :argname "<name>" :convert(values.short),
    command:option "--app-id" :argname "<name>" :convert(values.short))
  command:group("Message",
    command:option "-f --file" :argname "<file>"
      :description "The bytes of this file are the message ('-': all of stdin).",
    command:option "-n --count" :argname "<n>" :convert(values.count) :description "Publish the message n times.",
    command:option "--window" :argname "<n>" :convert(values.integer(1, 1000000)) :default "1000"
      :description "How many may wait for their confirm at once.")
  common(command)
end

function publish.check(args)
  if args.body and args.file then return "a body and --file: give one of them" end
  if args.exchange == "" and args.routing_key == "" then
    return "where to? --routing-key names a queue, --exchange an exchange"
  end
  if args.count and not args.body and not args.file then
    return "--count repeats a body or a --file; lines of stdin are published once each"
  end
end

local properties = {
  "content_type", "content_encoding", "priority", "correlation_id", "reply_to", "expiration", "message_id", "type",
  "user_id", "app_id",
}

local function publish_options(args)
  local options = {
    exchange = args.exchange, routing_key = args.routing_key, headers = values.table(args.header),
    mandatory = not args.no_mandatory, persistent = not args.transient,
  }
  for _, name in ipairs(properties) do options[name] = args[name] end
  if args.timestamp then options.timestamp = require "moonrabbit".types.timestamp(args.timestamp) end
  return options
end

local function read_file(path)
  if path == "-" then return io.stdin:read "*a" end
  local file, err = io.open(path, "rb")
  if not file then return nil, err end
  local body
  body, err = file:read "*a"
  file:close()
  if not body then return nil, path .. ": " .. tostring(err) end
  return body
end

-- Every outcome that is no success, gathered by what it was.
local Tally = {}
Tally.__index = Tally

local function new_tally()
  return setmetatable({ published = 0, confirmed = 0, failed = 0, kinds = {}, reasons = {}, order = {} }, Tally)
end

function Tally:fail(err)
  self.failed = self.failed + 1
  local kind = err.kind
  self.kinds[kind] = (self.kinds[kind] or 0) + 1
  local reason = tostring(err)
  if not self.reasons[reason] then
    self.reasons[reason] = { count = 0, err = err }
    self.order[#self.order + 1] = reason
  end
  self.reasons[reason].count = self.reasons[reason].count + 1
end

function Tally:take(ok, err)
  if ok then self.confirmed = self.confirmed + 1 else self:fail(err) end
end

-- The confirmations that are not settled yet, oldest first.
local Pending = {}
Pending.__index = Pending

function Pending:push(confirmation)
  self.last = self.last + 1
  self[self.last] = confirmation
end

-- How long to wait for an answer: until the time is up without one, and not at all after that.
local function patience(job, deadline)
  if job.gave_up then return 0 end
  if job.stop_at and job.stop_at < deadline then deadline = job.stop_at end
  return math.max(0, deadline - connect.now())
end

-- Settles until no more than `most` are left. Each answer gives the broker the whole time again; once it was too
-- slow, what is left is taken as it is.
function Pending:reap(most, job)
  local deadline = connect.now() + job.timeout
  while self.last - self.first + 1 > most do
    local confirmation = self[self.first]
    self[self.first] = nil
    self.first = self.first + 1
    local ok, err = confirmation:wait(patience(job, deadline))
    if not ok and err.kind == "timeout" then
      job.gave_up = true
    elseif not job.gave_up then
      deadline = connect.now() + job.timeout
    end
    job.tally:take(ok, err)
  end
end

-- Bodies one after another: a function that returns the next body or nil.
local function repeated(body, count)
  local given = 0
  return function()
    if given == count then return nil end
    given = given + 1
    return body
  end
end

-- Reading stdin blocks, so everything published so far is sent before it may.
local function lines(conn)
  local poller = require "moonrabbit.net".poller()
  -- A regular file cannot be watched (nil, text), and never makes anyone wait.
  local ok, set = pcall(poller.set, poller, 0, "r")
  local watched = ok and set
  return function()
    if watched and poller:wait(0) == 0 then conn:flush() end
    return io.stdin:read "*l"
  end
end

local function report(tally, seconds, code)
  output.result({
    published = tally.published, confirmed = tally.confirmed, failed = tally.failed,
    outcomes = tally.kinds, seconds = tonumber(("%.6f"):format(seconds)),
  }, ("%d published, %d confirmed%s"):format(tally.published, tally.confirmed,
    tally.failed > 0 and (", %d failed"):format(tally.failed) or ""))
  for i, reason in ipairs(tally.order) do
    if i > 5 then
      output.complain(("and %d other reasons"):format(#tally.order - 5))
      break
    end
    local known = tally.reasons[reason]
    output.complain((known.count > 1 and known.count .. " messages: " or "") .. reason)
    if code == exit.ok then code = connect.exit_code(known.err) end
  end
  return code
end

-- After these nothing further would leave either, or only after as long a wait.
local ends = { closed = true, channel = true, blocked = true, overflow = true, timeout = true }

-- Publishes until the bodies end, the connection breaks, the broker takes no more or somebody says stop.
local function send_all(publisher, next_body, job)
  local tally, pending = job.tally, job.pending
  while not job.stopped and not job.gave_up do
    local body = next_body()
    if not body then break end
    tally.published = tally.published + 1
    local confirmation, err = publisher:send_async(body)
    if confirmation then
      pending:push(confirmation)
    else
      tally:fail(err)
      if ends[err.kind] then break end
    end
    pending:reap(job.window - 1, job)
    if tally.published % 256 == 0 then job.bar:update(tally.confirmed) end
  end
  pending:reap(0, job)
  job.bar:finish()
end

local function given_body(args)
  if args.file then return read_file(args.file) end
  return args.body
end

function publish.run(args)
  local body, problem = given_body(args)
  if problem then
    output.complain(problem)
    return exit.usage
  end
  -- While stdin makes us wait, nobody answers heartbeats.
  local conn, code = connect.open(args, not body and { heartbeat = 0 } or nil)
  if not conn then return code end
  local publisher, err = conn:publisher(publish_options(args))
  if not publisher then
    conn:close(1)
    return connect.fail(err)
  end

  local began = connect.now()
  local job = {
    tally = new_tally(), pending = setmetatable({ first = 1, last = 0 }, Pending), window = args.window,
    timeout = args.timeout or 10, bar = progress.new("confirmed", body and (args.count or 1), connect.now),
  }
  local unwatch
  if body then
    unwatch = connect.on_stop(function(why)
      if job.stopped then return end
      job.stopped, job.stop_at = why, connect.now() + STOP
      -- A wait that has begun knows nothing of it: the close ends that.
      require "moonrabbit.runtime.native".sleep(STOP)
      conn:close(0)
    end)
  end
  -- A read of stdin cannot be woken: there SIGINT ends the process in its own way.
  send_all(publisher, body and repeated(body, args.count or 1) or lines(conn), job)
  if unwatch then unwatch() end
  conn:close(job.stop_at and math.max(0, job.stop_at - connect.now()) or job.timeout)
  return report(job.tally, connect.now() - began, job.stopped or exit.ok)
end

return publish
