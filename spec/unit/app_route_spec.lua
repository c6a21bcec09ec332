local compile = require "moonrabbit.app.route.compile"
local route = require "moonrabbit.app.route"
local Trie = require "moonrabbit.app.route.trie"

local function message(fields)
  fields = fields or {}
  fields.routing_key = fields.routing_key or "key"
  fields.properties, fields.headers = fields.properties or {}, fields.headers or {}
  fields.body = fields.body or ""
  return fields
end

-- Named targets, and what a route finds for a message.
local names = {}
local function to(name)
  local function handler() return name end
  names[handler] = name
  return handler
end

local function find(target, fields)
  local compiled = assert(compile.compile(target))
  return names[compiled.resolve(message(fields), {})]
end

-- What AMQP says, by brute force.
local function matches(pattern, key)
  local function words(text)
    local list = {}
    if text == "" then return list end
    for word in (text .. "."):gmatch "(.-)%." do list[#list + 1] = word end
    return list
  end
  local p, k = words(pattern), words(key)
  local function from(i, j)
    if i > #p then return j > #k end
    if p[i] == "#" then
      for at = j, #k + 1 do
        if from(i + 1, at) then return true end
      end
      return false
    end
    return j <= #k and (p[i] == "*" or p[i] == k[j]) and from(i + 1, j + 1)
  end
  return from(1, 1)
end

describe("route.trie", function()
  local function first(patterns, key)
    local trie = Trie.new()
    for i, pattern in ipairs(patterns) do trie:add(pattern, i) end
    return trie:first(key, 0), trie
  end

  it("matches as AMQP does", function()
    assert.equal(1, first({ "a.*.c" }, "a.b.c"))
    assert.is_false(first({ "a.*.c" }, "a.c"))
    assert.equal(1, first({ "a.#.c" }, "a.c"))
    assert.equal(1, first({ "a.#" }, "a"))
    assert.equal(1, first({ "#" }, ""))
    assert.is_false(first({ "*" }, ""))
    assert.equal(1, first({ "" }, ""))
    assert.equal(1, first({ "a.*.b" }, "a..b"))
  end)

  it("finds the first of those that match, then the next", function()
    local rule, trie = first({ "x.y", "a.*", "#", "a.b", "a.b" }, "a.b")
    assert.equal(2, rule)
    assert.equal(3, trie:first("a.b", 2))
    assert.equal(4, trie:first("a.b", 3))
    assert.equal(5, trie:first("a.b", 4))
    assert.is_false(trie:first("a.b", 5))
    assert.same({ 2, 3, 4, 5 }, trie:every "a.b")
  end)

  it("agrees with the rules of AMQP on any patterns and keys", function()
    local seed = 7
    local function random(n)
      seed = (seed * 16807) % 2147483647
      return seed % n + 1
    end
    local pattern_words, key_words = { "a", "b", "*", "#", "c" }, { "a", "b", "c", "" }
    local function make(words)
      local list = {}
      for i = 1, random(5) - 1 do list[i] = words[random(#words)] end
      return table.concat(list, ".")
    end
    for _ = 1, 300 do
      local patterns, key = {}, make(key_words)
      for i = 1, random(12) do patterns[i] = make(pattern_words) end
      local _, trie = first(patterns, key)
      local expected = {}
      for i, pattern in ipairs(patterns) do
        if matches(pattern, key) then expected[#expected + 1] = i end
      end
      assert.same(expected, trie:every(key), table.concat(patterns, " ") .. " / " .. key)
      local found, after = {}, 0
      while true do
        after = trie:first(key, after)
        if not after then break end
        found[#found + 1] = after
      end
      assert.same(expected, found)
    end
  end)

  it("does not explode", function()
    local patterns = {}
    for i = 1, 200 do patterns[i] = ("#.a.#.a.#.a.#.a.#.x%d"):format(i) end
    assert.is_false(first(patterns, ("a."):rep(120) .. "y"))
  end)
end)

describe("route", function()
  it("takes the first rule that holds", function()
    local r = route.first {
      route.key("order.*.created", to "created"),
      route.key("order.#", to "order"),
      route.header({ type = "refund" }, to "refund"),
      route.otherwise(to "rest"),
    }
    assert.equal("created", find(r, { routing_key = "order.eu.created" }))
    assert.equal("order", find(r, { routing_key = "order.eu.paid", headers = { type = "refund" } }))
    assert.equal("refund", find(r, { headers = { type = "refund" } }))
    assert.equal("rest", find(r))
  end)

  it("keeps the order of rules of different kinds", function()
    local r = route.first {
      route.key("a.#", to "1"), route.when(function(m) return m.body == "x" end, to "2"), route.key("#", to "3"),
    }
    assert.equal("1", find(r, { routing_key = "a.b", body = "x" }))
    assert.equal("2", find(r, { routing_key = "b", body = "x" }))
    assert.equal("3", find(r, { routing_key = "b" }))
  end)

  it("asks headers: all, any, absent, present, predicates", function()
    local function big(v) return v > 10 end
    local r = route.first {
      route.header({ type = "refund", amount = big }, to "big refund"),
      route.header({ vip = route.present, test = route.absent }, to "vip"),
      route.header_any({ a = 1, b = 2 }, to "a or b"),
    }
    assert.equal("big refund", find(r, { headers = { type = "refund", amount = 11 } }))
    assert.is_nil(find(r, { headers = { type = "refund", amount = 9 } }))
    assert.is_nil(find(r, { headers = { type = "refund" } }))
    assert.equal("vip", find(r, { headers = { vip = false } }))
    assert.is_nil(find(r, { headers = { vip = true, test = 1 } }))
    assert.equal("a or b", find(r, { headers = { b = 2 } }))
    assert.equal("a or b", find(r, { headers = { a = 1, b = 3 } }))
    assert.is_nil(find(r, { headers = { a = 2, b = 1 } }))
  end)

  it("asks properties", function()
    local r = route.first { route.property({ type = "x", content_type = route.present }, to "x") }
    assert.equal("x", find(r, { properties = { type = "x", content_type = "a/b" } }))
    assert.is_nil(find(r, { properties = { type = "x" } }))
  end)

  it("nests, and asks the next rule where the nested route takes nothing", function()
    local r = route.first {
      route.key("order.#", route.first { route.header({ type = "refund" }, to "refund") }),
      route.key("order.new", to "new"),
    }
    assert.equal("refund", find(r, { routing_key = "order.new", headers = { type = "refund" } }))
    assert.equal("new", find(r, { routing_key = "order.new" }))
    assert.is_nil(find(r, { routing_key = "order.old" }))
  end)

  describe("by a field of JSON", function()
    local r = route.first {
      route.json("customer.country", "de", to "de"),
      route.json("items.1.sku", function(sku) return sku:find "^A" end, to "A"),
      route.json("paid", false, to "unpaid"),
      route.json("customer", route.absent, to "nobody"),
    }

    it("finds it", function()
      assert.equal("de", find(r, { body = '{"customer":{"country":"de"}}' }))
      assert.equal("A", find(r, { body = '{"customer":1,"items":[{"sku":"A7"}]}' }))
      assert.equal("unpaid", find(r, { body = '{"customer":1,"paid":false}' }))
      assert.equal("nobody", find(r, { body = '{"customer":null}' }))
      assert.is_nil(find(r, { body = '{"customer":{"country":"fr"},"items":[]}' }))
    end)

    it("fails for good where a body is not the JSON that it claims", function()
      local ok, err = pcall(find, r, { body = "{oops", properties = { content_type = "application/json; charset=x" } })
      assert.is_false(ok)
      assert.equal("permanent", err.kind)
      assert.truthy(err.message:find("not the JSON that its content_type 'application/json", 1, true))
    end)

    it("is looked for once in what is no JSON, too", function()
      local reads = 0
      local msg = setmetatable({ routing_key = "k", headers = {}, properties = {} }, { __index = function(_, name)
        if name ~= "body" then return nil end
        reads = reads + 1
        return "{oops"
      end })
      assert.equal("nobody", names[assert(compile.compile(r)).resolve(msg, {})])
      assert.equal(1, reads)
    end)

    it("has no field in what claims nothing, or something else", function()
      local only = route.first { route.json("a", 1, to "a") }
      assert.is_nil(find(only, { body = "{oops" }))
      assert.is_nil(find(only, { body = '{"a":1}', properties = { content_type = "text/plain" } }))
      assert.equal("a", find(only, { body = '{"a":1}', properties = { content_type = "application/vnd.x+json" } }))
      assert.is_nil(find(only, { body = "[1]" }))
      assert.is_nil(find(only, { body = "7" }))
    end)
  end)

  describe("targets", function()
    local function run(target, fields, app)
      local compiled = assert(compile.compile(target))
      local msg, job = message(fields), {}
      return compile.run(compiled.resolve(msg, job), msg, app, job)
    end

    it("send on, publish, park and drop", function()
      local sent = {}
      local app = {}
      function app:forward(...) sent = { "forward", ... } return true end -- luacheck: ignore
      function app:publish(...) sent = { "publish", ... } return nil, "full" end -- luacheck: ignore
      assert.is_true(run(route.forward("x", nil, { set = { a = 1 } }), { body = "b" }, app))
      assert.same({ "forward", "x", { set = { a = 1 } } }, { sent[1], sent[3], sent[5] })
      assert.is_true(run(route.publish("x", "k"), {}, app))
      assert.same({ "forward", "x", "k" }, { sent[1], sent[3], sent[4] })
      local made = route.publish("x", "k", function(m) return m.body:upper(), { type = "t" } end)
      assert.same({ nil, "full" }, { run(made, { body = "b" }, app) })
      assert.same({ "publish", "B", { exchange = "x", routing_key = "k", type = "t" } }, sent)
      assert.equal("dead_letter", run(route.dead_letter "why").action)
      assert.equal("drop", run(route.drop()).action)
      local ok, problem = run(route.publish("x", "k", function() end), {}, app)
      assert.is_nil(ok)
      assert.truthy(problem:find("gave a nil for the body", 1, true))
    end)

    it("fan out, and the first failure ends it", function()
      local seen = {}
      local function note(name, ...)
        local results = { ... }
        return function()
          seen[#seen + 1] = name
          return (unpack or table.unpack)(results, 1, #results) -- luacheck: ignore
        end
      end
      assert.is_true(run { note "a", note("b", true), route.drop() })
      assert.same({ "a", "b" }, seen)
      seen = {}
      local ok, failed = run { note "a", function() seen[#seen + 1] = "b" return nil, "no" end, note "c" }
      assert.is_nil(ok)
      assert.equal("no", failed.message)
      assert.same({ "a", "b" }, seen)
      assert.equal("drop", run({ route.drop(), route.drop() }).action)
      assert.equal("dead_letter", run({ note "a", route.dead_letter "x" }).action)
    end)

    it("fan out wherever in the list one is chosen by the message", function()
      for at = 1, 5 do
        local list, seen = {}, {}
        for i = 1, 5 do list[i] = function() seen[#seen + 1] = i end end
        list[at] = route.first { route.key("a", list[at]) }
        assert.is_true(run(list, { routing_key = "a" }))
        assert.same({ 1, 2, 3, 4, 5 }, seen)
        assert.is_true(run(list, { routing_key = "b" }))
        assert.equal(9, #seen)
      end
    end)

    it("of route.all are all that hold, or the otherwise", function()
      local seen = {}
      local function note(name) return function() seen[#seen + 1] = name end end
      local r = route.all {
        route.key("a.#", note "1"), route.key("#", note "2"), route.key("b", note "3"),
        route.header({ x = 1 }, note "4"), route.otherwise(note "5"),
      }
      run(r, { routing_key = "a.b", headers = { x = 1 } })
      assert.same({ "1", "2", "4" }, seen)
      seen = {}
      local only = route.all { route.key("a", note "1"), route.otherwise(note "5") }
      run(only, { routing_key = "b" })
      assert.same({ "5" }, seen)
    end)

    it("in a list fail where nobody takes the message", function()
      local ok, failed = run({ route.first { route.key("x", to "x") } }, { routing_key = "y" })
      assert.is_nil(ok)
      assert.truthy(failed.message:find("no route takes the message", 1, true))
    end)
  end)

  describe("mistakes", function()
    local function mistake(expected, fn, ...)
      local ok, err = pcall(fn, ...)
      assert.is_false(ok)
      assert.truthy(tostring(err):find(expected, 1, true), tostring(err))
    end
    local h = to "h"

    it("throw where they stand", function()
      local _, err = pcall(function() route.key("a", nil) end)
      assert.truthy(err:find "app_route_spec%.lua:%d+: route%.key: the target is missing")
    end)

    it("of patterns and conditions", function()
      mistake("whole words", route.key, "a*.b", h)
      mistake("must be a string", route.key, nil, h)
      mistake("did you mean 'content_type'", route.property, { content_typ = 1 }, h)
      mistake("it is empty", route.header, {}, h)
      mistake("a predicate function", route.when, true, h)
      mistake("'x' must be a value", route.header, { x = {} }, h)
      mistake("the path", route.json, "", 1, h)
    end)

    it("of lists", function()
      mistake("there are no rules", route.first, {})
      mistake("rule 1 is a function", route.first, { h })
      mistake("rule 2 can never be asked", route.first, { route.otherwise(h), route.key("a", h) })
      mistake("rule 2 is missing", route.first, { route.key("a", h), nil, route.key("b", h) })
      mistake("has named fields", route.first, { route.key("a", h), x = 1 })
      mistake("the target is a rule", route.otherwise, route.key("a", h))
      mistake("in the list, at 2", route.otherwise, { h, "x" })
    end)

    it("of targets", function()
      mistake("must be a string", route.dead_letter, 7)
      mistake("unknown option 'sett'", route.forward, "x", nil, { sett = {} })
      mistake("a function that makes the body", route.publish, "x", "k", "body")
    end)

    it("are routes that lead back to themselves", function()
      local rules = { route.key("a", h) }
      local r = route.first(rules)
      rules[2] = route.otherwise(r)
      local compiled, problem = compile.compile(r)
      assert.is_nil(compiled)
      assert.truthy(problem:find("leads back to itself", 1, true))
      local list = { h }
      list[2] = list
      mistake("leads back to itself", route.otherwise, list)
    end)
  end)
end)
