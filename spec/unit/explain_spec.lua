local mr = require "moonrabbit"
local explain = require "moonrabbit.life.explain"
local process = require "support.process"
local script = require "moonrabbit.life.script"
local route = mr.route

local function app(fields)
  local spec = { name = "shop", consumers = { { queue = "q", handler = function() end } }, queues = { q = {} } }
  for name, value in pairs(fields) do spec[name] = value end
  return mr.app(spec)
end

local function names(set)
  local list = {}
  for name in pairs(set) do list[#list + 1] = name end
  table.sort(list)
  return list
end

describe("explain", function()
  it("finds the queues that a message reaches", function()
    local plan = app {
      exchanges = {
        t = { alternate = "rest" }, rest = { type = "fanout" }, d = { type = "direct" }, h = { type = "headers" },
        inner = { type = "fanout", bind = { { "t", "inner.*" } } }, x = { type = "x-consistent-hash" },
      },
      queues = {
        q = { bind = { { "t", "order.#" }, { "d", "k" } } },
        other = { bind = { { "rest" }, { "h", "", arguments = { a = 1, b = 2 } }, { "amq.topic", "*" } } },
        any = { bind = { { "h", "", arguments = { ["x-match"] = "any", a = 1, b = 2 } }, { "inner" } } },
      },
    }.plan
    local function reached(exchange, key, headers)
      local queues, unknown = explain.queues(plan, exchange, explain.message("", { routing_key = key,
        headers = headers }))
      return table.concat(names(queues), " ") .. (next(unknown) and " ?" or "")
    end
    assert.equal("q", reached("t", "order.eu.new"))
    assert.equal("any", reached("t", "inner.x"))
    assert.equal("other", reached("t", "nobody"))
    assert.equal("q", reached("d", "k"))
    assert.equal("", reached("d", "no"))
    assert.equal("any other", reached("h", "", { a = 1, b = 2 }))
    assert.equal("any", reached("h", "", { a = 1 }))
    assert.equal("", reached("h", "", { a = 3 }))
    assert.equal("other", reached("amq.topic", "word"))
    assert.equal("q", reached("", "q"))
    assert.equal(" ?", reached("x", "k"))
  end)

  it("tells which route is taken, both ways of a canary, and runs no handler", function()
    local function v1() error "ran" end
    local function v2() error "ran" end
    local consumer = app { consumers = { { queue = "q", route = route.first {
      route.key("a", route.canary { stable = v1, candidate = v2, weight = 10 }),
      route.key("b", route.forward("elsewhere")),
      route.when(function(msg) return msg.headers.n > 1 end, route.drop()),
    } } } }.plan.consumers[1]
    local function taken(key, headers)
      return explain.route(consumer, explain.message("", { routing_key = key, headers = headers }))
    end
    local both = taken "a"
    assert.same({ 90, 10 }, { both[1].percent, both[2].percent })
    assert.truthy(both[1].text:find "handler" and both[1].text ~= both[2].text)
    assert.truthy(taken("b")[1].text:find("elsewhere", 1, true))
    assert.truthy(taken("c", { n = 2 })[1].text:find "drop")
    assert.truthy(taken("c", { n = 0 })[1].text:find "no rule takes it")
    assert.truthy(taken("c")[1].text:find "a condition threw")
  end)

  it("tells what of a list takes a message", function()
    local consumer = app { consumers = { { queue = "q", route = {
      route.first { route.key("a", route.drop()) },
      route.first { route.key("a", route.forward("elsewhere")), route.key("b", route.drop()) },
    } } } }.plan.consumers[1]
    local function taken(key) return explain.route(consumer, explain.message("", { routing_key = key }))[1].text end
    assert.truthy(taken("a"):find("^drop.*, then route%.forward to 'elsewhere'"), taken "a")
    assert.truthy(taken("b"):find "^drop")
    assert.truthy(taken("c"):find("no rule takes it", 1, true))
  end)

  it("prints the timetable of retries", function()
    local function lines(consumer)
      consumer.queue, consumer.handler = "q", function() end
      local made = app { consumers = { consumer } }
      return table.concat(explain.retries(made, made.plan.consumers[1]), "\n")
    end
    local text = lines { retry = mr.retry.steps { 1, 5 } }
    assert.truthy(text:find("attempt 2 fails: again in 5 s (6 s after the first failure)", 1, true), text)
    assert.truthy(text:find("'shop.dead'", 1, true))
    assert.truthy(lines({ retry = mr.retry.constant { delay = 10, jitter = 0.5 } }):find "again in 5 to 15 s")
    assert.truthy(lines({ dead_letter = false }):find "rejected")
    assert.truthy(lines({ retry = function() end }):find "a function of yours")
  end)

  it("lists every step of a ladder that has its own, and no ladder where retries stay in the process", function()
    local function waits(consumer, queue)
      consumer.queue, consumer.handler = "q", function() end
      local list = {}
      local made = app { queues = { q = queue or {} }, consumers = { consumer } }
      for _, step in ipairs(explain.topology(made)) do
        if step[1] == "queue" and step[2] ~= "q" then list[#list + 1] = step[2] end
      end
      table.sort(list)
      return list, table.concat(explain.retries(made, made.plan.consumers[1]), "\n")
    end
    local policy = mr.retry.constant { delay = 5 }
    assert.same({ "shop.dead", "shop.orphans", "shop.wait.1s", "shop.wait.60s" },
      (waits { retry = function() return 1 end, ladder = { mode = "existing", steps = { 1, 60 } } }))
    local list, text = waits({ retry = policy }, { type = "stream" })
    assert.same({ "shop.dead" }, list)
    assert.truthy(text:find("the waiting is in the process", 1, true), text)
    list, text = waits { retry = policy }
    assert.equal(3, #list)
    assert.is_nil(text:find("in the process", 1, true))
  end)

  it("lists the ladder with every step that jitter may need", function()
    local made = app { consumers = { { queue = "q", handler = function() end,
      retry = mr.retry.by_error { { kind = "timeout", mr.retry.constant { delay = 30, attempts = 2 } },
        otherwise = mr.retry.constant { delay = 1, attempts = 2, jitter = 0.2 } } } } }
    local waits = {}
    for _, step in ipairs(explain.topology(made)) do
      if step[1] == "queue" and step[2]:find "%.wait%." then waits[#waits + 1] = step[2]:match "[^.]+$" end
    end
    table.sort(waits)
    assert.same({ "1100ms", "1200ms", "1s", "30s", "800ms", "850ms", "900ms", "950ms" }, waits)
  end)
end)

describe("loading a script", function()
  local folder

  before_each(function()
    folder = os.tmpname()
    os.remove(folder)
    os.execute("mkdir " .. folder)
  end)
  after_each(function() os.execute("rm -rf " .. folder) end)

  local function write(name, text)
    local file = assert(io.open(folder .. "/" .. name, "wb"))
    file:write(text)
    file:close()
    return folder .. "/" .. name
  end

  it("says file and line, of a tail call too", function()
    local path = write("a.lua", "local mr = require 'moonrabbit'\n\nreturn mr.app {\n  nam = 'x' }\n")
    local loaded, problem = script.load(path)
    assert.is_nil(loaded)
    -- The call begins on line 3; LuaJIT names the line where it ends.
    assert.truthy(problem:find "a%.lua:[34]: mr%.app: ", problem)
    assert.truthy(problem:find("'nam'", 1, true), problem)
    loaded, problem = script.load(write("b.lua", "\n\nlocal x = nil + 1\n"))
    assert.is_nil(loaded)
    assert.truthy(problem:find("b.lua:3: ", 1, true), problem)
    loaded, problem = script.load(write("c.lua", "error({ message = 'x' })\n"))
    assert.is_nil(loaded)
    assert.truthy(problem:find("c.lua:1: ", 1, true), problem)
    loaded, problem = script.load(folder .. "/none.lua")
    assert.is_nil(loaded)
    assert.truthy(problem:find "no such file")
  end)

  it("leaves a debugger's or a coverage tool's hook as it was", function()
    local path = write("a.lua", "return require('moonrabbit').app { name = 'x', queues = { q = {} }, "
      .. "consumers = { { queue = 'q', handler = print } } }\n")
    local before, mask, count = debug.gethook()
    finally(function() debug.sethook(before, mask, count) end)
    local function hook() end
    debug.sethook(hook, "l", 7)
    local loaded = script.load(path)
    local after = { debug.gethook() }
    assert.truthy(loaded)
    assert.same({ hook, "l", 7 }, after)
  end)

  it("loads the folder's modules anew, and no others", function()
    write("life_spec_own.lua", "return {}\n")
    local path = write("a.lua", "LIFE_SPEC = require 'life_spec_own'\nreturn require 'moonrabbit'.app { name = 'x', "
      .. "queues = { q = {} }, consumers = { { queue = 'q', handler = function() end } } }\n")
    local old_path, core = package.path, package.loaded["moonrabbit.core"]
    assert(script.load(path))
    local first = rawget(_G, "LIFE_SPEC")
    assert(script.load(path))
    assert.are_not.equal(first, rawget(_G, "LIFE_SPEC"))
    local second = package.loaded.life_spec_own
    write("a.lua", "require 'life_spec_own'\nerror 'no'\n")
    assert.is_nil(script.load(path))
    assert.equal(second, package.loaded.life_spec_own)
    assert.equal(core, package.loaded["moonrabbit.core"])
    rawset(_G, "LIFE_SPEC", nil)
    package.loaded.life_spec_own, package.path = nil, old_path
  end)

  it("is what moonrabbit explain does, without a broker", function()
    local path = write("a.lua", "return require 'moonrabbit'.app { name = 'x', queues = { q = {} }, consumers = { "
      .. "{ queue = 'q', handler = function() end } } }\n")
    local result = process.run({ "bin/moonrabbit", "explain", path, "-k", "q", "-e", "" })
    assert.equal("", result.err)
    assert.truthy(result.out:find("the handler at", 1, true), result.out)
    assert.equal(2, process.run({ "bin/moonrabbit", "explain", folder .. "/none.lua" }).code)
    path = write("b.lua", "return require 'moonrabbit'.app { name = 'x', exchanges = { orders = {} }, "
      .. "queues = { q = {} }, consumers = { { queue = 'q', handler = function() end } } }\n")
    result = process.run({ "bin/moonrabbit", "explain", path, "-e", "order" })
    assert.truthy(result.out:find("is not among the app's (did you mean orders?)", 1, true), result.out)
  end)
end)
