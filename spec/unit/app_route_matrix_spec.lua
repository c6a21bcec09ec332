-- Every kind of rule with every kind of target, by the runner: what becomes of the message, and of one whose condition
-- does not hold, or throws.
local mr = require "moonrabbit"
local rig = require "support.runner_bench"

local route = mr.route
local function holds() return true end

-- The message that all of them are about.
local function message(fields)
  local all = { routing_key = "order.eu.created", headers = { type = "refund" }, properties = { app_id = "shop" },
    body = '{"customer":{"country":"de"}}' }
  for name, value in pairs(fields or {}) do all[name] = value end
  return all
end

-- name -> { a route in which the rule holds, one in which it does not }
local rules = {
  key = { function(t) return route.key("order.*.created", t) end,
    function(t) return route.key("order.created", t) end },
  header = { function(t) return route.header({ type = "refund" }, t) end,
    function(t) return route.header({ type = "refund", amount = 1 }, t) end },
  header_any = { function(t) return route.header_any({ type = "refund", amount = 1 }, t) end,
    function(t) return route.header_any({ amount = 1, n = 2 }, t) end },
  absent = { function(t) return route.header({ amount = route.absent }, t) end,
    function(t) return route.header({ type = route.absent }, t) end },
  property = { function(t) return route.property({ app_id = "shop" }, t) end,
    function(t) return route.property({ app_id = "other" }, t) end },
  json = { function(t) return route.json("customer.country", "de", t) end,
    function(t) return route.json("customer.country", "fr", t) end },
  when = { function(t) return route.when(function(m) return #m.body > 0 end, t) end,
    function(t) return route.when(function(m) return m.body == "" end, t) end },
  first = { function(t) return route.key("#", route.first { route.key("order.#", t) }) end,
    function(t) return route.key("#", route.first { route.key("x", t) }) end },
  all = { function(t) return route.key("#", route.all { route.key("order.#", t) }) end,
    function(t) return route.key("#", route.all { route.key("x", t) }) end },
}

-- name -> { target, outcome, what the app has sent }
local targets = {
  handler = { holds, "ok" },
  ["a handler that fails"] = { function() return nil, "no" end, "retry" },
  forward = { route.forward("ex"), "ok", "forward ex nil" },
  ["forward with a key"] = { route.forward("ex", "k"), "ok", "forward ex k" },
  publish = { route.publish("ex", "k", function(m) return m.body:upper() end), "ok", "publish ex k" },
  ["publish of nothing"] = { route.publish("ex", "k", function() end), "retry" },
  ["publish that throws"] = { route.publish("ex", "k", function() error "no body" end), "retry" },
  ["publish unchanged"] = { route.publish("ex", "k"), "ok", "forward ex k" },
  list = { { holds, route.forward "ex", holds }, "ok", "forward ex nil" },
  ["a list that fails"] = { { holds, function() error "no" end, route.forward "ex" }, "retry" },
  dead_letter = { route.dead_letter "odd", "dead_letter" },
  drop = { route.drop(), "drop" },
  ["stable"] = { route.canary { weight = 0, stable = route.forward "ex", candidate = route.drop() }, "ok",
    "forward ex nil" },
  ["candidate"] = { route.canary { weight = 100, stable = holds, candidate = route.drop() }, "drop" },
  nested = { route.first { route.header({ type = "refund" }, route.drop()), route.otherwise(holds) }, "drop" },
  ["nested all"] = { route.all { route.key("order.#", holds), route.header({ type = "refund" }, route.forward "ex") },
    "ok", "forward ex nil" },
}

describe("a route", function()
  local r

  local function sent()
    local list = {}
    for i, each in ipairs(r.app.sent) do
      if type(each[1]) == "string" then
        list[i] = ("publish %s %s"):format(each[2].exchange, each[2].routing_key)
      else
        list[i] = ("forward %s %s"):format(each[2], tostring(each[3]))
      end
    end
    return table.concat(list, ", ")
  end

  local function handle(rule_list, fields)
    r = rig.new { retry = function() return 5 end, route = rule_list }
    local handled = r:handle(message(fields))
    assert.equal("ack", handled.done)
    assert.same({ 0, 0 }, { r.runner.running, r.runner.in_flight })
    return r.outcomes
  end

  for rule_name, pair in pairs(rules) do
    for target_name, target in pairs(targets) do
      it(("by %s to %s"):format(rule_name, target_name), function()
        for _, kind in ipairs { "first", "all" } do
          local rest = route.otherwise(route.dead_letter "rest")
          assert.same({ target[2] }, handle(route[kind] { pair[1](target[1]), rest }))
          assert.equal(target[3] or "", sent())
          if target[2] == "dead_letter" then assert.equal("odd", r.copies[1][3]) end
          -- What does not hold leaves the message to the next.
          assert.same({ "drop" }, handle(route[kind] { pair[2](target[1]), route.otherwise(route.drop()) }))
          assert.equal("", sent())
          assert.same({ "dead_letter" }, handle(route[kind] { pair[2](target[1]) }))
          assert.truthy(r.copies[1][4].message:find("no route takes the message", 1, true))
        end
      end)
    end
  end

  it("whose condition throws has failed: the policy decides", function()
    local function broken() error "broken condition" end
    local conditions = {
      route.when(broken, holds), route.header({ type = broken }, holds), route.header_any({ type = broken }, holds),
      route.property({ app_id = broken }, holds), route.json("customer", broken, holds),
      route.key("#", route.first { route.when(broken, holds) }),
      route.key("#", { holds, route.all { route.when(broken, holds) } }),
      route.key("#", route.canary { weight = 1, stable = holds, candidate = holds, sticky = broken }),
    }
    for _, rule in ipairs(conditions) do
      for _, kind in ipairs { "first", "all" } do
        assert.same({ "retry" }, handle(route[kind] { rule, route.otherwise(route.drop()) }))
        assert.truthy(r.copies[1][4].message:find("broken condition", 1, true))
      end
    end
  end)

  it("by a field fails for good on a body that is not the JSON it claims, whatever the policy says", function()
    for _, body in ipairs { "", "{", "nul", '{"a":1}}', "\255", '{"a":' .. ("["):rep(5000) } do
      local rule_list = route.first { route.key("other", holds), route.json("customer", 1, holds),
        route.otherwise(holds) }
      local properties = { content_type = "application/json" }
      assert.same({ "dead_letter" }, handle(rule_list, { body = body, properties = properties }))
      assert.equal("permanent", r.copies[1][3])
      assert.truthy(r.copies[1][4].message:find("not the JSON", 1, true))
      -- One that claims nothing has no such field.
      assert.same({ "ok" }, handle(rule_list, { body = body }))
    end
  end)

  it("that sends what nobody takes, or the broker refuses, has failed: its message is not acked as handled", function()
    local refused = require "moonrabbit.errors".new { kind = "unroutable", message = "no queue takes the message" }
    for _, target in ipairs { route.forward "ex", route.publish("ex", "k", function() return "x" end),
      { holds, route.forward "ex" } } do
      r = rig.new { retry = function() return 5 end, route = target }
      r.app.fails = refused
      function r.app.publish() return nil, refused end
      r:handle(message())
      assert.same({ "retry" }, r.outcomes)
      assert.equal(refused, r.copies[1][4].value)
    end
  end)
end)
