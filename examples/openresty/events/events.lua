--- Server-sent events from a queue: each worker has one exclusive queue, bound to the exchange "events", and hands what
-- comes to all of its browsers. One that does not keep up loses the oldest events, and is told how many. What comes
-- while a browser is connecting again is lost to it.
local rabbit = require "moonrabbit.resty"
local semaphore = require "ngx.semaphore"

local events = {}

local EXCHANGE = "events"
local MOST = 100 -- events that may wait for one browser
local PING = 15 -- seconds without an event
local LOOK = 1  -- seconds; so soon is noticed that the worker leaves

local browsers, watching = {}, 0

local function queue(conn)
  local channel, err = conn:channel()
  if not channel then return nil, err end
  local ok, declared
  ok, err = channel:exchange_declare(EXCHANGE, { type = "topic", durable = true })
  if ok then declared, err = channel:queue_declare("", { exclusive = true }) end
  if declared then ok, err = channel:queue_bind(declared.queue, EXCHANGE, "#") else ok = nil end
  channel:close()
  return ok and declared.queue, err
end

local function hand_out(message)
  -- A line break would end the event.
  local event = { key = message.routing_key:gsub("[\r\n]", " "), data = message.body:gsub("\r\n?", "\n") }
  for browser in pairs(browsers) do
    if #browser == MOST then
      table.remove(browser, 1)
      browser.lost = browser.lost + 1
    else
      browser.ready:post(1)
    end
    browser[#browser + 1] = event
  end
  message:ack()
end

function events.start()
  rabbit.start { uri = os.getenv "AMQP_URL" or "amqp://guest:guest@127.0.0.1/", name = "events" }
  rabbit.consume { queue = queue, handler = hand_out, prefetch = 100, concurrency = 1 }
end

local function write(event)
  local data = "data: " .. event.data:gsub("\n", "\ndata: ")
  return ngx.print(("event: message\nid: %s\n%s\n\n"):format(event.key, data)) and ngx.flush(true)
end

local function serve(browser)
  local quiet = 0
  while not ngx.worker.exiting() do
    local ok = true
    if browser.ready:wait(LOOK) then
      quiet = 0
      local event = table.remove(browser, 1)
      if browser.lost > 0 then
        ok = ngx.print(("event: lost\ndata: %d\n\n"):format(browser.lost))
        browser.lost = 0
      end
      if ok and event then ok = write(event) end
    else
      quiet = quiet + LOOK
      if quiet % PING == 0 then ok = ngx.print ": still here\n\n" and ngx.flush(true) end
    end
    if not ok then return end
  end
end

function events.stream()
  ngx.header["Content-Type"] = "text/event-stream"
  ngx.header["Cache-Control"] = "no-store"
  local browser = { ready = semaphore.new(), lost = 0 }
  browsers[browser], watching = true, watching + 1
  local function leave()
    if browsers[browser] then browsers[browser], watching = nil, watching - 1 end
  end
  ngx.on_abort(function()
    leave()
    ngx.exit(499)
  end)
  ngx.print ": hello\n\n"
  ngx.flush(true)
  local served, problem = pcall(serve, browser)
  leave()
  if not served then error(problem, 0) end
end

--- How many pages are open, on the worker that answers.
function events.stats() ngx.say(watching) end

return events
