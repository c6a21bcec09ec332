-- moonrabbit run --metrics: what it tells of the app's ladder, in one process and in several, over reloads.
local broker = require "support.broker"
local http = require "support.http"
local life = require "support.life"

-- The first step is named by the policy, the second only known to a function.
local script = [[
local mr = require "moonrabbit"
return mr.app {
  name = "$NAME",
  queues = { ["$QUEUE"] = {} },
  consumers = { { queue = "$QUEUE", retry = POLICY, handler = function(msg) error("VERSION", 0) end } },
}
]]

local steps = "mr.retry.steps { 60, attempts = 9 }"
local unnamed = "function() return 300 end"

describe("moonrabbit run --metrics and the ladder", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench

  before_each(function()
    bench = life.new()
    bench:connect()
  end)

  after_each(function()
    bench:stop()
    bench:clean(".wait.60s", ".wait.300s")
  end)

  local function write(policy, version)
    bench:write("app.lua", (script:gsub("POLICY", policy):gsub("VERSION", version or "one")))
  end

  local function start(words)
    local all = { "--metrics", "127.0.0.1:0" }
    for _, word in ipairs(words or {}) do all[#all + 1] = word end
    local running = bench:start(all)
    life.said(running, "/metrics")
    local port = tonumber(running:err():match "http://127%.0%.0%.1:(%d+)/metrics")
    broker.eventually(function() return http.get(port, "/readyz") == 200 end, 30, "ready")
    return running, port
  end

  local function publish(count)
    for i = 1, count do bench:publish(tostring(i)) end
  end

  local function page(port) return "\n" .. select(2, http.get(port, "/metrics")) end

  local function series(port, name)
    local found = {}
    for line in page(port):gmatch("\nmoonrabbit_" .. name .. "([{ ][^\n]*)") do found[#found + 1] = line end
    return found
  end

  local function settled(port)
    local name = 'moonrabbit_messages_settled_total{queue="%s",outcome="retry"}'
    return http.sample(page(port), name:format(bench.queue))
  end

  local function waits(port, step, count, seconds)
    local line = ('{ladder="%s",step="%s"} %d'):format(bench.name, step, count)
    broker.eventually(function()
      for _, each in ipairs(series(port, "ladder_waiting")) do
        if each == line then return true end
      end
    end, seconds or 10, line)
  end

  local function reload(running, count)
    running:signal "HUP"
    broker.eventually(function() return select(2, running:err():gsub("info  reloaded", "")) == count end, 20, "reload")
  end

  local function ends(running)
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end

  it("is looked at when the app starts, and at each reload; nothing is there twice", function()
    write(steps)
    local running, port = start()
    publish(3)
    broker.eventually(function() return settled(port) == 3 end, 20, "three retries")
    for i = 1, 3 do
      write(steps, "version " .. i)
      reload(running, i) -- looks at once
      waits(port, "60s", 3)
      assert.same({ ('{ladder="%s",step="60s"} 3'):format(bench.name) }, series(port, "ladder_waiting"))
      assert.same({ ('{ladder="%s"} 1'):format(bench.name) }, series(port, "ladder_known"))
      assert.same({ ('{ladder="%s"} 0'):format(bench.name) }, series(port, "ladder_orphans"))
      assert.same({}, series(port, "ladder_stuck"))
    end
    assert.equal(3, settled(port))
    ends(running)
  end)

  it("is looked at on, a step too that only the old script has used", function()
    write(unnamed)
    local running, port = start()
    publish(2)
    broker.eventually(function() return settled(port) == 2 end, 20, "two retries")
    for i = 1, 2 do
      reload(running, i)
      waits(port, "300s", 2)
    end
    ends(running)
  end)

  it("goes from the page with the ladder's name, when a reload gives it another", function()
    write(steps)
    local running, port = start()
    broker.eventually(function() return #series(port, "ladder_known") == 1 end, 10, "a look")
    bench:write("app.lua", (script:gsub("POLICY", steps .. ", ladder = '$NAME.other'"):gsub("VERSION", "two")))
    finally(function()
      local cleaning = broker.ok(broker.connect():channel())
      cleaning:queue_delete(bench.name .. ".other.orphans")
      for _, name in ipairs { ".other.home", ".other.orphans" } do cleaning:exchange_delete(bench.name .. name) end
    end)
    reload(running, 1)
    local other = { ('{ladder="%s.other"} 1'):format(bench.name) }
    broker.eventually(function()
      local found = series(port, "ladder_known")
      return #found == 1 and found[1] == other[1]
    end, 10, "the other ladder alone")
    assert.same({ ('{ladder="%s.other"} 0'):format(bench.name) }, series(port, "ladder_orphans"))
    ends(running)
  end)

  it("is asked of the management API with --management, and then says what is stuck", function()
    local url = os.getenv "AMQP_MANAGEMENT_URL"
    if not url then return pending "needs AMQP_MANAGEMENT_URL" end
    write(unnamed)
    local running, port = start { "--management", url }
    publish(2)
    broker.eventually(function() return settled(port) == 2 end, 20, "two retries")
    reload(running, 1)
    -- The management API's numbers are some seconds old: a reload looks again.
    local reloads = 1
    broker.eventually(function()
      for _, each in ipairs(series(port, "ladder_waiting")) do
        if each == ('{ladder="%s",step="300s"} 2'):format(bench.name) then return true end
      end
      reloads = reloads + 1
      reload(running, reloads)
      return false
    end, 30, "two wait")
    assert.same({ ('{ladder="%s",step="300s"} 0'):format(bench.name) }, series(port, "ladder_stuck"))
    assert.is_nil(running:err():find("guest:guest", 1, true))
    ends(running)
    local bad = bench:start { "--management", "ftp://x" }
    assert.equal(2, life.ended(bad))
    assert.truthy(bad:err():find("must start with http:// or https://", 1, true), bad:err())
  end)

  it("is every worker's, and counted once", function()
    write(steps)
    local running, port = start { "--workers", "2" }
    publish(4)
    broker.eventually(function() return settled(port) == 4 end, 20, "four retries")
    running:signal "HUP"
    life.said(running, "2 workers have reloaded")
    waits(port, "60s", 4, 20)
    assert.same({ ('{ladder="%s"} 1'):format(bench.name) }, series(port, "ladder_known"))
    assert.same({ ('{ladder="%s",step="60s"} 4'):format(bench.name) }, series(port, "ladder_waiting"))
    ends(running)
  end)
end)
