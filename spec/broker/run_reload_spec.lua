-- What a reload under load carries over: breakers and canaries go on as they are.
local broker = require "support.broker"
local http = require "support.http"
local life = require "support.life"

local script = [[
local mr = require "moonrabbit"
local function note(text)
  local file = io.open("$FOLDER/seen", "a")
  file:write(text, "\n")
  file:close()
end
return mr.app {
  name = "$NAME",
  queues = { ["$QUEUE"] = {} },
  consumers = { { queue = "$QUEUE", prefetch = 8, concurrency = 8, FIELDS } },
}
]]

describe("a reload of moonrabbit run under load", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench

  before_each(function()
    bench = life.new()
    bench:connect()
  end)

  after_each(function()
    bench:stop()
    bench:clean()
  end)

  local function publish(body) bench:publish(tostring(body)) end

  local function seen(word)
    local count = 0
    for _, line in ipairs(bench:lines "seen") do
      if line:match("^" .. word .. " %d+$") then count = count + 1 end
    end
    return count
  end

  local function start(fields)
    bench:write("app.lua", (script:gsub("FIELDS", fields)))
    local running = bench:start { "--metrics", "127.0.0.1:0" }
    life.said(running, "runs")
    return running, tonumber(running:err():match "http://127%.0%.0%.1:(%d+)/metrics")
  end

  local function reload(running, fields)
    bench:write("app.lua", (script:gsub("FIELDS", fields)))
    running:signal "HUP"
  end

  local function sample(port, name, labels)
    local _, page = http.get(port, "/metrics")
    return http.sample(page, ("moonrabbit_%s{%s}"):format(name, labels))
  end

  it("keeps a breaker open", function()
    local function fields(version)
      return "breaker = { failures = 3, within = 600, pause = 600 }, handler = function(msg) if msg.body == 'bad' then"
        .. " error('it is away', 0) end note('" .. version .. " ' .. msg.body) end"
    end
    local running, port = start(fields "one")
    local of_queue = ('queue="%s"'):format(bench.queue)
    for i = 1, 50 do publish(i) end
    for _ = 1, 3 do publish "bad" end
    broker.eventually(function() return sample(port, "breaker_open", of_queue) == 1 end)
    for i = 51, 60 do publish(i) end
    broker.eventually(function() return sample(port, "messages_in_flight", of_queue) == 8 end)
    reload(running, fields "two")
    for i = 61, 80 do publish(i) end
    life.said(running, "reloaded")
    local before = sample(port, "messages_delivered_total", of_queue)
    -- What the old script held goes back, and the new one is given as much as it may have: it holds it too.
    broker.eventually(function()
      return sample(port, "messages_in_flight", of_queue) == 8
        and sample(port, "messages_settled_total", of_queue .. ',outcome="requeue"') >= 8
    end)
    assert.truthy(sample(port, "messages_delivered_total", of_queue) >= before)
    assert.equal(0, seen "two")
    assert.equal(1, sample(port, "breaker_open", of_queue))
    running:signal "TERM"
    assert.equal(0, life.ended(running))
    broker.eventually(function()
      return broker.ok(bench.channel:queue_declare(bench.queue, { passive = true })).message_count == 80 - seen "one"
    end)
  end)

  it("keeps a canary rolled back", function()
    local function fields(version)
      return "route = mr.route.canary { name = 'pay', version = '2', weight = 50, window = 600,"
        .. " rollback = { error_rate = 0.05, min = 5 }, candidate = function() error('a bug', 0) end,"
        .. " stable = function(msg) note('" .. version .. " ' .. msg.body) end }"
    end
    local running, port = start(fields "one")
    local total = 0
    local function some(count)
      for _ = 1, count do
        total = total + 1
        publish(total)
      end
    end
    broker.eventually(function()
      some(10)
      return sample(port, "canary_rollbacks_total", 'route="pay"') == 1
    end, 20)
    local failed = 'route="pay",version="candidate",result="failed"'
    broker.eventually(function() return seen "one" + sample(port, "canary_runs_total", failed) == total end)
    local before = sample(port, "canary_runs_total", failed)
    assert.truthy(before >= 5)
    some(20)
    reload(running, fields "two")
    some(60)
    life.said(running, "reloaded")
    broker.eventually(function() -- the old one is given no more
      return broker.ok(bench.channel:queue_declare(bench.queue, { passive = true })).consumer_count == 1
    end)
    some(60)
    broker.eventually(function() return seen "one" + seen "two" + before == total end, 20, "all by the stable version")
    assert.truthy(seen "two" >= 60)
    assert.equal(before, sample(port, "canary_runs_total", failed))
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)
end)
